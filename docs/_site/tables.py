"""Tables of pages: columns of numbers are set to the right, so that they can be compared."""

import re

from docutils import nodes
from sphinx.transforms import SphinxTransform

# 1,024 and 593–601 and 0.79 ± 0.01 and 1.02 (0.97–1.07) and ≤ 1.1e-7 and 4 %; what was not measured
# is a dash.
NUMBER = re.compile(
    r"[≤<~−-]? ?\d[\d.,]*(–[\d.,]+)?(e[+-]?\d+)?( ?[%×])?( ± [\d.]+)?( \([\d.]+–[\d.]+\))?"
)


class Numbers(SphinxTransform):
    default_priority = 403

    def apply(self):
        for body in list(self.document.findall(nodes.tbody)):
            head = [row for row in body.parent.findall(nodes.row) if row.parent is not body]
            for i, column in enumerate(zip(*(row.children for row in body.children))):
                texts = [cell.astext().strip() for cell in column]
                some = [text for text in texts if text not in ("", "–", "-")]
                # A word among them, such as "exact", is no other column.
                if some and sum(map(bool, map(NUMBER.fullmatch, some))) >= 0.75 * len(some):
                    for cell in [*column, *(row[i] for row in head)]:
                        cell["classes"].append("number")


def setup(app):
    app.add_transform(Numbers)
    return {"parallel_read_safe": True}
