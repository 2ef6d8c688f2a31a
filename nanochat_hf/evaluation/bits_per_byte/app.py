"""The Space's page: a table to try the metric on."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("bits_per_byte.py"))
