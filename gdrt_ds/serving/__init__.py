"""An HTTP service that recommends as evaluation does: exact scores, in batches, behind a bounded queue.

    worker.py    the one thread that owns the model: queue, batches, lists
    limits.py    what a request may cost before it reaches the queue: bytes, time
    service.py   routes and their schemas (FastAPI)
    metrics.py   counters in the format of Prometheus
    running.py   a server (uvicorn) that ends when all accepted requests are answered

The command is gdrt_ds/serve.py.
"""
