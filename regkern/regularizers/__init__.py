"""The regularizers: each is its configuration and its terms. A family is a file here, and known by being there."""

import importlib
import pkgutil
import re

from regkern.regularizers.activity import activity_penalty as activity_penalty
from regkern.regularizers.base import FAMILY as FAMILY
from regkern.regularizers.base import PenaltyRegularizer as PenaltyRegularizer
from regkern.regularizers.base import Regularizer as Regularizer
from regkern.regularizers.base import Sum as Sum
from regkern.regularizers.elementwise import L1 as L1
from regkern.regularizers.elementwise import L1L2 as L1L2
from regkern.regularizers.elementwise import L2 as L2
from regkern.regularizers.elementwise import l1_l2 as l1_l2
from regkern.regularizers.groups import GroupLasso as GroupLasso
from regkern.regularizers.groups import SparseGroupLasso as SparseGroupLasso
from regkern.regularizers.huber import Huber as Huber
from regkern.regularizers.log_sum import LogSum as LogSum
from regkern.regularizers.mcp import MCP as MCP
from regkern.regularizers.orthogonal import Covariance as Covariance
from regkern.regularizers.orthogonal import OrthogonalRegularizer as OrthogonalRegularizer
from regkern.regularizers.orthogonal import SoftOrthogonal as SoftOrthogonal
from regkern.regularizers.scad import SCAD as SCAD


def _find_families() -> None:
    """Import each file of this package, and enter its classes by their lower-case names."""
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for cls in vars(module).values():
            own = isinstance(cls, type) and issubclass(cls, PenaltyRegularizer) and cls.__module__ == module.__name__
            if own and cls is not PenaltyRegularizer:
                cls.__module__ = __name__
                FAMILY[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()] = cls


_find_families()

l1 = L1
l2 = L2
orthogonal_regularizer = OrthogonalRegularizer
