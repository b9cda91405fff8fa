"""`python ARGUMENTS` by the fork server, for what a script under test starts by `sys.executable`; see PLAINLOOP_PYTHON."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # this interpreter knows its standard library only
from fork_server import Forked

arguments = [argument for argument in sys.argv[1:] if argument not in ("-u", "-P")]  # of torch's launcher, of export.py
job: Forked | None = None
early: list[int] = []  # signals that came before the job was there


def forward(signum: int, _: object) -> None:
    if job is None:
        early.append(signum)
    else:
        job.send_signal(signum)


forwarded = {
    signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
}
try:
    if arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        raise RuntimeError("only a fresh interpreter takes options of its own")
    job = Forked(arguments, cwd=Path.cwd(), env=dict(os.environ), stdin=0, stdout=1, stderr=2)
except RuntimeError:  # or the server refused: start a fresh interpreter
    for signum, handler in forwarded.items():
        signal.signal(signum, handler)
    os.execv(sys.executable, [sys.executable, *arguments])
for signum in early:
    job.send_signal(signum)
code = job.wait()
if code < 0:
    if -code != signal.SIGKILL:  # which has no handler
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
