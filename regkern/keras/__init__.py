"""Keras 3 and tf_keras: penalties of models that exist, exact zeros from `fit`, and saving with regkern's regularizers.

Importing this module registers regkern's classes with `keras` and `tf_keras`, as far as they are loaded (with `keras`
where none is). Where regkern and one of them are both imported, in whatever order, this module is as well. A model with
regkern's regularizers that is saved from then on loads

- with regkern's regularizers where regkern has been imported as well, in every format but tf_keras's HDF5, which
  keeps nothing but class names;
- with Keras's own where it has not, even where regkern is not installed. A layer gives a regularizer's config to
  `keras.regularizers.get`, which takes the registered name ``regkern>L2`` where it is known, and else the class name
  ``L2``, which is one of its own with the same arguments. The penalty is the same, from Keras's operations. A config
  that no class of Keras has, an orthogonal regularizer with leading_axes or an MCP, is refused there.

A model saved without this import loads with Keras's own regularizers everywhere; `accelerate` replaces them.

`regularize` gives the variables of a built model their penalties, `ProximalCallback` makes weights exactly zero while
`fit` trains, and `FactorSchedule` moves a factor.

Objects registered by `regkern.register_keras_serializable` are registered with Keras as well.

Reference: https://keras.io/guides/serialization_and_saving/
"""

import sys

from regkern.keras.callbacks import FactorSchedule, ProximalCallback
from regkern.keras.registration import register
from regkern.keras.regularizing import regularize, restore
from regkern.keras.replacing import accelerate

__all__ = ["FactorSchedule", "ProximalCallback", "accelerate", "regularize", "restore"]

if not {"keras", "tf_keras"} & sys.modules.keys():
    import keras  # noqa: F401
register()
