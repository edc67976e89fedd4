"""A small funnel that all tests of the server share, and a server on a port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import uvicorn
from fastapi import FastAPI

from fullrank.data.simulate import simulate_dataset
from fullrank.funnel import Funnel, FunnelConfig, StageSizes, train_funnel
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.training import TrainerConfig


@pytest.fixture(scope="session")
def funnel(tmp_path_factory: pytest.TempPathFactory) -> Funnel:
    dataset = simulate_dataset(tmp_path_factory.mktemp("log") / "data", 3000, 3, items=80, users=60)
    training = TrainerConfig(batch_size=256)
    final = FinalConfig(model={"name": "din", "hidden": [16], "embedding_dim": 8}, training=training)
    sizes = StageSizes(retrieve=50, keep=20)
    return train_funnel(dataset, FunnelConfig(early=EarlyConfig(training=training), final=final, sizes=sizes))[0]


Listening = Callable[[FastAPI], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def listening() -> Listening:
    """Makes an application answer on a port of this machine; gives its address."""

    @contextmanager
    def serve(app: FastAPI) -> Iterator[str]:
        # Made from its number, it knows that it speaks TCP: else no answer would be sent at once.
        with socket.socket(fileno=socket.create_server(("127.0.0.1", 0)).detach()) as listener:
            server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            deadline = time.monotonic() + 30
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.01)
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join(10)

    return serve
