"""The worked server, under load on loopback: many clients, of which some go away."""

import io
import random
import threading
import time
from collections import Counter

import httpx
import pytest
import torch
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import kvruntime
from examples.server import PAGE_BYTES, PLANE_BYTES, make_app
from kvruntime.reference import load_model

MEMORY = "50MiB"  # about one of the largest requests
POLICIES = (
    {"policy": "full", "budget": 1.0},
    {"policy": "scalekv", "budget": 0.1},
    {"policy": "centroid", "budget": "2%", "kv_dtype": "int4"},
    {"policy": "ams_kv", "budget": 0.2, "kv_dtype": "int8"},
)


@pytest.fixture
def served():
    """The server's address and its app, on a pool that holds about two of the largest requests."""
    app = make_app(memory=MEMORY, models=3, most_waiting=100)
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", app
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def figures(address):
    """Every sample of /metrics, by its name and labels."""
    text = httpx.get(f"{address}/metrics").text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("clients", "requests"), [(6, 18), pytest.param(16, 200, marks=pytest.mark.full)]
)
def test_every_client_is_answered_and_nothing_is_left(served, clients, requests):
    address, app = served
    numbers, answers = list(range(requests)), Counter()
    wrong = []

    def work(client_number):
        chance = random.Random(client_number)
        with httpx.Client(timeout=120) as client:
            while True:
                try:
                    number = numbers.pop()
                except IndexError:
                    return
                labels = [chance.randrange(24) for _ in range(chance.choice([1, 1, 2, 4]))]
                wish = {"labels": labels, "seed": number, **chance.choice(POLICIES)}
                patience = 0.01 + chance.random() / 3 if number % 3 == 0 else None
                try:
                    answer = client.post(f"{address}/pictures", json=wish, timeout=patience or 120)
                except httpx.TimeoutException:
                    assert patience is not None
                    answers["gone"] += 1
                    continue
                answers[answer.status_code] += 1
                if answer.status_code != 200 or answer.headers["content-type"] != "image/png":
                    wrong.append(answer.text)
                elif Image.open(io.BytesIO(answer.content)).size != (64 * len(labels), 64):
                    wrong.append("size")

    threads = [threading.Thread(target=work, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a client waits for ever"
    assert not wrong, wrong[:3]
    assert answers["gone"] > requests / 20 and answers[200] + answers["gone"] == requests
    painter, until = app.state.painter, time.monotonic() + 30
    while painter.admission.stats.underway and time.monotonic() < until:
        time.sleep(0.01)  # those whose client went last
    stats, pool = painter.admission.stats, painter.pool.stats
    assert (stats.underway, stats.queued, stats.held_pages) == (0, 0, 0)
    assert (pool.live_pages, pool.reserved_pages) == (0, 0)
    painter.admission.check()
    painter.pool.check()
    read = figures(address)
    assert read[("kvruntime_pool_live_pages",)] == 0
    assert read[("kvruntime_requests_total", ("how", "200"))] >= answers[200]
    assert read[("kvruntime_request_seconds_count",)] >= answers[200]


def test_what_a_client_gets_and_what_is_refused(served):
    address, app = served
    wish = {"labels": [3, 14], "seed": 5, "policy": "centroid", "budget": "4%"}
    answer = httpx.post(f"{address}/pictures", json=wish, timeout=60)
    assert answer.status_code == 200, answer.text
    model = load_model()
    pool = kvruntime.Pool(MEMORY, page_bytes=PAGE_BYTES, plane_bytes=PLANE_BYTES)
    with kvruntime.attach(model, "centroid", "4%", pool=pool):
        own = model.generate(torch.tensor([3, 14]), seed=5)
    strip = torch.cat(list(own.clamp(0, 1)), dim=2)
    sent = torch.tensor(list(Image.open(io.BytesIO(answer.content)).tobytes()), dtype=torch.float32)
    sent = sent.view(64, 128, 3).permute(2, 0, 1) / 255
    assert torch.allclose(sent, strip, atol=0.6 / 255)
    too_large = {"labels": [1] * 100, "policy": "full", "budget": 1.0}
    for bad, status, said in (
        (too_large, 413, r"rows would fit"),
        ({"labels": [10**6]}, 422, "labels must be below"),
        ({"labels": []}, 422, "at least 1 item"),
        ({"labels": [1], "policy": "best"}, 422, "unknown policy"),
        ({"labels": [1], "policy": "centroid", "budget": "0.0001%"}, 413, "bytes needed"),
    ):
        refused = httpx.post(f"{address}/pictures", json=bad)
        assert refused.status_code == status and said in refused.text, refused.text
    assert app.state.painter.admission.stats.underway == 0
    assert figures(address)[("kvruntime_requests_total", ("how", "413"))] == 2
