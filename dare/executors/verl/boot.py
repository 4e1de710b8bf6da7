"""What verl loads in every process that imports it, through its `verl.plugins` entry points: our CPU platform.

It registers itself under a name of its own and changes nothing for other users of verl on the same machine. The engine
is registered by our worker, which alone asks for it, so that `import verl` does not build on our network code.
"""

from __future__ import annotations

from dare.executors.verl import platform as platform
