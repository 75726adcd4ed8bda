"""Guard a model that is trained by several processes: DDP replicas or FSDP2 shards.

One rank leads: the first of the group. It alone holds policy, ledger, log and store, and takes the
whole update through the steps of a release, like a guard of one process. The others follow.

- Every rank says what it asks for, and where one asks for something else, all withhold.
- Every norm is of the whole update, and each coordinate gets one draw of noise, since one process
  holds the update when it is clipped and noised.
- A rank that is lost, late or at odds makes the living ranks withhold; nothing is released in part.
- What crosses ranks is the global state, shards of the model, and what was released; of errors it
  is the reason code, never a text.
"""

from sentinel.distributed.guard import Guard
from sentinel.distributed.round import Round

__all__ = ["Guard", "Round"]
