"""`python ARGUMENTS` by the fork server, for what a script under test starts by `sys.executable`; see PLAINLOOP_PYTHON."""

import contextlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # this interpreter knows its standard library only
from fork_server import Forked

arguments = [
    argument for argument in sys.argv[1:] if argument != "-u"
]  # that of torch's launcher: what is printed comes late
try:
    job = Forked(arguments, cwd=Path.cwd(), env=dict(os.environ), stdin=0, stdout=1, stderr=2)
except RuntimeError:  # it sets what is read at import
    os.execv(sys.executable, [sys.executable, *arguments])
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda number, _: job.send_signal(number))
code = job.wait()
if code < 0:
    with contextlib.suppress(OSError):  # SIGKILL has no handler
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
