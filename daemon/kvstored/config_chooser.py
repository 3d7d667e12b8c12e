"""The value of one setting after the other, from what was given, and the account of where each came from."""

from collections.abc import Sequence
from typing import TypeVar

from kvstore.report import ConfigValue
from kvstored.layers import Given
from kvstored.settings import Basis, Setting
from kvstored.units import ConfigError

T = TypeVar("T")


class Chooser:
    """Takes the last value given for a setting, or its default, and keeps the account."""

    def __init__(self, given: Sequence[Given]) -> None:
        self.given = given
        self.values: list[ConfigValue] = []
        self.places: dict[str, str] = {}

    def choose(self, setting: Setting[T], basis: Basis) -> T:
        """The value of `setting`. Defaults are parsed too: the one of a path comes from the environment."""
        mine = [given for given in self.given if given.setting is setting]
        origin, place = "default", f"default of {setting.toml}"
        if not mine:
            value = _parsed(setting, setting.kind.show(setting.default(basis)), place)
        for given in mine:
            origin, place = given.origin, given.place
            value = _parsed(setting, given.text, place)
        self.places[setting.name] = place
        shown = setting.kind.show(value)
        self.values.append(ConfigValue(setting.toml, shown, origin, setting.unit, setting.reason))
        return value


def _parsed(setting: Setting[T], text: str, place: str) -> T:
    try:
        return setting.kind.parse(text)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
