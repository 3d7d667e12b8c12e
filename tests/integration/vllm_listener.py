"""Run by a Python that has vLLM: subscribes, decodes with vLLM's own classes, and prints what it has heard.

    python vllm_listener.py ENDPOINT COUNT

One line of JSON for each of COUNT messages: the topic, the number, events by vLLM's names, and whether vLLM would have
written the same bytes.
"""

import json
import sys

import msgspec
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

PATIENCE_MS = 60_000


def main(endpoint: str, count: int) -> None:
    """Say `ready` once whatever is published is heard."""
    decoder, encoder = msgspec.msgpack.Decoder(KVEventBatch), msgspec.msgpack.Encoder()
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
    socket.subscribe(b"")
    socket.connect(endpoint)
    socket.recv_multipart()
    print("ready", flush=True)
    while True:  # what was published until somebody heard of it
        topic, number, payload = socket.recv_multipart()
        events = decoder.decode(payload).events  # none, where it is greeted
        if events and isinstance(events[0], AllBlocksCleared):
            break
    for _ in range(count):
        topic, number, payload = socket.recv_multipart()
        batch = decoder.decode(payload)
        kinds = (BlockStored, BlockRemoved, AllBlocksCleared)
        assert all(isinstance(event, kinds) for event in batch.events)
        said = {
            "topic": topic.decode(),
            "number": int.from_bytes(number, "big"),
            "events": [msgspec.to_builtins(event) for event in batch.events],
            "same": encoder.encode(batch) == payload,
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
