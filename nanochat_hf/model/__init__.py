"""The model. The two files beside this one import nothing else of ours: they are what a Hub copy carries."""
