"""Yardsticks: bits per byte, CORE and ChatCORE as lm-eval tasks, and the lm-eval model class that scores them fast.

Nothing is imported here: lm-eval is heavy, and `bpb` alone must stay light enough for the training loop.
"""
