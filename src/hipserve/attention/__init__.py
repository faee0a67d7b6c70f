"""One attention layer, whole: select, attend, and when to select again."""

from hipserve.attention.hip import hip_attention
from hipserve.attention.layer import SelectionReuse, attend

__all__ = ["SelectionReuse", "attend", "hip_attention"]
