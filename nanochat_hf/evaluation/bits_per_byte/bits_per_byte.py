"""Bits per byte, a metric module of the `evaluate` library that needs nothing of this package.

    import evaluate
    metric = evaluate.load("nanochat_hf/evaluation/bits_per_byte")
    metric.add_batch(predictions=[2.31, 0.04], references=[5, 1])   # nats and bytes, a token (or a whole row) each
    metric.compute()   # {"bits_per_byte": 0.565..., "nats": 2.35, "bytes": 6}

The README.md and app.py beside this file make the folder a Space: `evaluate.load("OWNER/bits_per_byte")` after
`huggingface-cli upload --repo-type space OWNER/bits_per_byte nanochat_hf/evaluation/bits_per_byte .`
"""

import math

import datasets
import evaluate

_DESCRIPTION = """\
A language model's loss per byte of text, in bits: what it would take to compress the text with the model. Other than
loss per token or perplexity it can be compared between models with different tokenizers.
"""

_INPUTS = """\
predictions: loss in nats, one number a token, or summed over the tokens of a row.
references: bytes (UTF-8) each of them stands for. What has 0 bytes (special tokens, padding, masked targets) counts on
    neither side.
Returns bits_per_byte, and the sums it is made of: nats and bytes.
"""

_CITATION = """\
@misc{nanochat, author = {Andrej Karpathy}, title = {nanochat}, year = {2025},
  url = {https://github.com/karpathy/nanochat}}
"""


class BitsPerByte(evaluate.Metric):
    """Nats over bytes and ln 2, both summed over everything that has bytes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        if any(num_bytes < 0 for num_bytes in references):
            raise ValueError(f"references are byte counts, 0 or more; found {min(references)}")
        num_bytes = sum(references)
        if num_bytes == 0:
            raise ValueError("no target with bytes to score: the batches hold no text, or it is masked out everywhere")
        nats = math.fsum(loss for loss, length in zip(predictions, references, strict=True) if length)
        return {"bits_per_byte": nats / (math.log(2) * num_bytes), "nats": nats, "bytes": num_bytes}
