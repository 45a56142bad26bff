"""`launch.py PROGRAM ARGUMENTS`: two processes that meet at its store, as those of torchrun do."""

import os
import runpy
import signal
import sys

port, to_workers = os.pipe()
workers = set()
for rank in ("0", "1"):
    if worker := os.fork():  # before the store, which has a thread
        workers.add(worker)
        continue
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": os.read(port, 5).decode()}
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()

from torch.distributed import TCPStore  # noqa: E402

store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
for _ in workers:
    os.write(to_workers, f"{store.port:5}".encode())
while workers:
    worker, status = os.wait()
    workers.remove(worker)
    if status:
        for other in workers:
            os.kill(other, signal.SIGKILL)
        sys.exit(1)
