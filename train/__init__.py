import signal
import sys

# Ctrl-C while `python -m train.sort` and the like still import ends them without a traceback.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
