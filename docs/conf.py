"""The site: `python -m sphinx -W -b html docs build/site`, with the docs extra.

Notebooks run, once for each of their versions, unless `-D nb_execution_mode=off` is given. Links
into the references of JAX, Flax, optax, orbax, NumPy and Python need their inventories from the
network: with `INTERSPHINX=1`, and on Read the Docs.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_site"), str(DOCS.parent)]
# One device, as a reader has, also where the notebooks run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import lora_jax  # noqa: E402, this checkout's

project = "lora_jax"
author = "the authors of lora_jax"
release = version = lora_jax.__version__
copyright = "the authors of lora_jax, Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "crosslinks",
    "docstrings",
    "error_pages",
    "public_names",
    "tables",
]
exclude_patterns = ["_site", "**/.ipynb_checkpoints"]

# Pages: Markdown that a forge renders as well.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
copybutton_exclude = ".linenos, .gp, .go"  # of doctests, the code alone
smartquotes_action = "D"  # not the quotes: "all-linear" is code

# Docstrings: Google's sections.
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Pattern": "Pattern", "Patterns": "Patterns"}
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

if os.environ.get("INTERSPHINX") or os.environ.get("READTHEDOCS"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "orbax": ("https://orbax.readthedocs.io/en/latest", None),
    }

# Files that are not pages: links into the repository, where the builder knows its address, else
# downloads.
_env = os.environ.get
if _env("READTHEDOCS_GIT_CLONE_URL", "").startswith("https:"):
    _clone = _env("READTHEDOCS_GIT_CLONE_URL").removesuffix(".git")
    crosslinks_files = f"{_clone}/blob/{_env('READTHEDOCS_GIT_COMMIT_HASH', 'main')}"
elif _env("GITHUB_REPOSITORY"):
    crosslinks_files = (
        f"{_env('GITHUB_SERVER_URL')}/{_env('GITHUB_REPOSITORY')}/blob/{_env('GITHUB_SHA')}"
    )

html_theme = "furo"
html_title = f"lora_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
