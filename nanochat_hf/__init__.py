"""nanochat on the HuggingFace stack: train, load, score, publish and talk to a small ChatGPT of your own."""

__version__ = "0.1.0"
