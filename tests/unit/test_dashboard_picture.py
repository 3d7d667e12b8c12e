"""The picture of the dashboard shows the dashboard that there is."""

from PIL import Image

from bench.dashboard import DIGEST_KEY, PICTURE, RATE_INTERVAL, digest, panels


def test_the_picture_was_drawn_from_the_panels_that_there_are() -> None:
    every = panels(RATE_INTERVAL)
    with Image.open(PICTURE) as picture:
        drawn = picture.info.get(DIGEST_KEY)
    assert drawn == digest(every), "draw it anew: python -m bench.dashboard"
    assert drawn != digest(every[:-1]), "a panel fewer would be noticed"
