"""What holds for all tests: Keras runs on torch, unless the environment says otherwise."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
