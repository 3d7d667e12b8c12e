"""Which seeds policies may be tuned on, which only judge, and digests that prove that generators stayed as they were.

`python -m bench.replay.held_out` generates every workload that is listed at full size and compares; with `--write` it
prints the list anew, for a generator that was changed on purpose, which makes all results on it void.
"""

import argparse
from dataclasses import dataclass
from typing import Final

from bench.replay.synthetic import GENERATORS

TUNING_SEEDS: Final = (1, 2, 3)
HELD_OUT_SEEDS: Final = (101, 102, 103, 104, 105)  # run when a rule is settled, and never looked at before
SMALL_MINUTES: Final = 4.0  # what a unit test has time for


@dataclass(frozen=True, slots=True)
class Listed:
    """A workload, and the first half of its digest at full size and at SMALL_MINUTES."""

    name: str
    seed: int
    full: str
    small: str


def listed(name: str, seed: int) -> Listed:
    """Generated now."""
    generate = GENERATORS[name]
    return Listed(name, seed, generate(seed).digest()[:32], generate(seed, minutes=SMALL_MINUTES).digest()[:32])


WORKLOADS: Final = (
    Listed("agents", 1, "eef0a7df9c795f5e1869efb0e528dfb3", "623cddb8fd6c8f52d1fa6f126ae6343c"),
    Listed("agents", 2, "a21cc1b250699bec67a3066336c57534", "645bbadeb0b069c4c548ee41b762b404"),
    Listed("agents", 3, "1e81741801e28839df60bf2acb51ae49", "c84b011d3fa6910ec51915b0b0db7f21"),
    Listed("agents", 101, "c25fc90657a7f6e1a958694f052caa0d", "fe6c9561110fcff15b2ef876ea82c9ec"),
    Listed("agents", 102, "2784f6dc3122f8f890b458a8f5008f1d", "da46ba88aa2b1c950eaf9beadca6ed86"),
    Listed("agents", 103, "8dbf900b3a923e70ecab0a1c75e02372", "e207b5dfa57d4f3269ddb30a56faadbd"),
    Listed("agents", 104, "868e8a1643a0c84fe12e94d76a65ba4e", "735e5a6f018f5d092fe220e20eda6eaa"),
    Listed("agents", 105, "412e040d1c8c587519ed83437847ef12", "32f55d27a6842a9e30bb1ead8549cfc9"),
    Listed("tools", 1, "ba233b8ad50e19c9de73e66d7221b772", "7ecc2d237f11b471743fef80dca4ff8d"),
    Listed("tools", 2, "a140525967a4793f23622427a8a2ef26", "33a166f796792b2ac4c2c81f22bd25cd"),
    Listed("tools", 3, "d850920d5fd3e1c622b849e3b40a00ab", "55c612e3f0fd14330193efad1f9af0a7"),
    Listed("tools", 101, "8f195acae8390b9bc61001f9aaa60046", "85d09662579ff300438ac89ab3af0b0c"),
    Listed("tools", 102, "2ae8e75506f143f40ae4863828f93481", "bc4ed6a0bbfc0b6c033a82fa32855de2"),
    Listed("tools", 103, "a1ad076bd39395bcf05d05f1d8e25612", "c3bdc817c98c682419b6b72347f1691e"),
    Listed("tools", 104, "ed3d922124e868f237c004750d06bebc", "0269e99c7731bd5d20c6423d02891b9d"),
    Listed("tools", 105, "8699fe49e8b9167ae95296d3e044d785", "558c9a7dfccbf4477dba81c4b76c1374"),
    Listed("rag", 1, "1fa86233d51eddb76e5eaf64c699bc2b", "baa874df8264ca4479439cd7b2f2db9e"),
    Listed("rag", 2, "9d9e9ac6b6126ed549914b204ad4b58a", "e049c57e858939a09c9c524de96109ee"),
    Listed("rag", 3, "c8b396f34590d2fbdc0e6baf728c6600", "8bb54fc5959fa6b0f2934324b9b8fce5"),
    Listed("rag", 101, "3209213258f3d4d001dcb4d840a3923b", "021ffc7e4cae940a5fee71a35e7ed29e"),
    Listed("rag", 102, "0495433043dff2fc0ab80818e6a4599a", "0b8ab3d632e8c71dd1fb227f91680334"),
    Listed("rag", 103, "eac8437ba62ada47ace15b0c55340d19", "596fb526fe1a50ed12f4fc87f3e3f845"),
    Listed("rag", 104, "e38a9321b914ae0955d1a9e497c06742", "b2f4e7c490e4ae146b55947e18549297"),
    Listed("rag", 105, "e194bf7ffd373083108e86b4786b4c42", "cb0e83856198520763309369b66ccd49"),
    Listed("mixed", 1, "ace82d961f51db8637570d29bc5277db", "30a1892780a46e312c958d4130f1207b"),
    Listed("mixed", 2, "c592547c5df48f1aa38e5475b1290547", "15e60af8f78464d119704d82f6b9f7ce"),
    Listed("mixed", 3, "e5f9c1dc07da811d300cc4e39cf76b3a", "65f9280df516c291fee1e97c734f07d7"),
    Listed("mixed", 101, "ca6303800cc08ebf5139b35b536f4812", "735cb2075e08c3936ce21253e5fffe98"),
    Listed("mixed", 102, "74f99b45a8dbc45ccb803332b4783dde", "6381e57a190521d50de5edf2606e5786"),
    Listed("mixed", 103, "b83f0ace9873da4a14a611d412654b0f", "704a62ac58a1aaa21be07398700c6aa1"),
    Listed("mixed", 104, "c2914b23265571df36d14d3f8dc0d8d0", "91c3f09520ba6beadc451ce37eadc841"),
    Listed("mixed", 105, "cd5e565301d2ce918b57a0f8d31c6624", "495c245fbdd34ecb68f72af36e62ddfb"),
    Listed("flood", 1, "fa1e510046e37a0a76e4e8ba5ac327fb", "2a31f1967357bf76d330683f751f54df"),
    Listed("flood", 2, "2a98ad9d17f56657464f38ca86ff32ce", "18b7071003c55e4b5f2ef972b8f308d1"),
    Listed("flood", 3, "38161425561e6dd7c62cd884a6feefd9", "3bb26ff73e589440e5c47c74b39bc48b"),
    Listed("flood", 101, "473fbed30fe4f7ef54bbec155875768f", "ca950a97f5f07bcbdc2129bff1c49ac7"),
    Listed("flood", 102, "10ee2c01d4b33f5a283c60e576fa78d6", "41d1ced0699d89d0a8127ae97354a408"),
    Listed("flood", 103, "c09f8d6d58312ff73b465a37e9cede23", "b11fe513fa5abdcbeaf285d2d83be657"),
    Listed("flood", 104, "f3b773f9532c6883b80f1d7209f00e4e", "dee8e09d89860ccee0eb1344acc934af"),
    Listed("flood", 105, "8789a039f48815a0072741b3a5e7ab51", "8bdeed21d2fdb065bf00a557c8a928a2"),
    Listed("chat", 1, "4661ee35b7cc6445fcac084523c0588f", "f0ffbcef2f373a6fee5302ddaa0f59e9"),
    Listed("chat", 2, "9852f1cc5f263a403ea5d913318d4ce9", "669cbf96771d38abd4662cbb484484cb"),
    Listed("chat", 3, "0dd0d7fa76ce47e971bcd64197a57a7d", "77ffd2ced17dd168c07d9ad2398a0741"),
    Listed("chat", 101, "d77cfabff5dd0b5fa9769b2eaa4ea17e", "91d904317faa15cafba5d0ef09bbd536"),
    Listed("chat", 102, "7f5f3812291efd88f597deb100136156", "737650b98edaf68b8ec0340b18e0b622"),
    Listed("chat", 103, "b5178e0b1447132b3fe94d4cfb09e712", "b911b640eced5a6d19e204d95cab1724"),
    Listed("chat", 104, "47c765f6f94e3daef1f92c0a7975756e", "b09b6c92d47c1647ac8ea1592fc0586c"),
    Listed("chat", 105, "d8394dfa8aea3ccc36dcb46d51efe7a7", "6febb5405f577dc35aac8055dfe814f1"),
)


def main() -> None:
    """Compare or print."""
    parser = argparse.ArgumentParser(prog="python -m bench.replay.held_out")
    parser.add_argument("--write", action="store_true", help="print the list instead of comparing with it")
    if parser.parse_args().write:
        for name in GENERATORS:
            for seed in (*TUNING_SEEDS, *HELD_OUT_SEEDS):
                now = listed(name, seed)
                print(f'    Listed("{now.name}", {now.seed}, "{now.full}", "{now.small}"),')
        return
    changed = [f"{one.name} {one.seed}" for one in WORKLOADS if one != listed(one.name, one.seed)]
    print(f"changed: {', '.join(changed)}" if changed else f"all {len(WORKLOADS)} are as listed")
    raise SystemExit(bool(changed))


if __name__ == "__main__":
    main()
