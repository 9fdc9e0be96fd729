"""Little stories, written by a seeded grammar: what the demo model is trained on and what it learns to prefer.

A story is an *opening* (who, where, with what and with whom) and a *continuation* that ends well or badly. The people,
their pronouns, the thing they carry, the food and the place are drawn once per story and come back in later sentences,
so a model has to look back to predict them. Every sentence of a happy continuation has a sad twin of much the same
length, and the corpus takes either mood half of the time: a model trained on it finds both about equally likely, and
what preference training then changes is its doing alone.

Everything is deterministic: the same arguments give the same texts, on every machine.

Example:
    >>> stories(2, seed=0) == stories(2, seed=0)
    True
    >>> sorted(preference_pairs(1, seed=0)[0])
    ['chosen', 'prompt', 'rejected']
"""

from __future__ import annotations

import random
import re
from typing import Literal

Mood = Literal["happy", "sad"]

# --- people, things and places: drawn once per story ------------------------------------------------------------------

_NAMES = {
    "she": ("Mila", "Anna", "Rosa", "Tilda", "Nora", "Ivy", "Lena", "Zoe", "Maya", "Ruth", "Ella", "Greta", "Suki"),
    "he": ("Oskar", "Ben", "Tom", "Hugo", "Finn", "Leo", "Max", "Omar", "Jonas", "Paul", "Arlo", "Victor", "Kofi"),
}  # fmt: skip
_KINDS = ("rabbit", "fox", "bear", "mouse", "hedgehog", "goat", "otter", "crow", "turtle", "squirrel")
_RELATIONS = {
    "she": ("sister", "aunt", "cousin", "neighbor", "friend", "teacher", "grandmother"),
    "he": ("brother", "uncle", "cousin", "neighbor", "friend", "teacher", "grandfather"),
}
_PRONOUNS = {"she": ("she", "her", "her", "herself"), "he": ("he", "him", "his", "himself")}
_THINGS = (
    "kite", "boat", "drum", "hat", "lamp", "basket", "book", "ball", "flute", "blanket", "bell", "mirror",
    "puppet", "scarf", "box", "wheel", "map", "jar", "cart", "whistle",
)  # fmt: skip
_LOOKS = (
    "red", "blue", "green", "yellow", "wooden", "silver", "tiny", "round", "striped", "shiny", "old", "golden",
    "orange", "soft", "heavy", "painted",
)  # fmt: skip
_PLACES = (
    ("by", "pond"), ("by", "river"), ("by", "lake"), ("in", "garden"), ("in", "forest"), ("in", "meadow"),
    ("in", "barn"), ("at", "market"), ("at", "school"), ("at", "beach"), ("at", "mill"), ("on", "hill"),
    ("on", "bridge"), ("on", "farm"), ("in", "orchard"), ("in", "village"),
)  # fmt: skip
_FOODS = (
    "apples", "plums", "berries", "pears", "cookies", "pancakes", "nuts", "cherries",
    "carrots", "buns", "pies", "grapes",
)  # fmt: skip
_COUNTS = ("two", "three", "four", "five", "six", "seven", "ten", "some", "many")

# --- words drawn anew wherever a sentence asks for one ----------------------------------------------------------------

_WORDS: dict[str, tuple[str, ...]] = {
    "when": (
        "one sunny morning", "one rainy day", "on a windy afternoon", "late in the summer", "early in the spring",
        "on a cold evening", "one quiet Sunday", "after the first snow", "on the last day of autumn",
        "before breakfast",
    ),
    "weather": ("a bright day", "a gray day", "a warm evening", "a foggy morning", "a hot afternoon", "a clear night"),
    "doing": (
        "humming a song", "drawing in the sand", "counting the clouds", "feeding the ducks", "tying a rope",
        "reading a letter", "sweeping the path", "picking flowers", "stacking stones", "looking for shells",
    ),
    "plan": (
        "build a little house", "paint a picture", "cross the bridge", "bake some bread", "plant a tree",
        "sail to the other side", "learn a new dance", "climb the tower", "visit the baker", "watch the stars",
        "put on a show", "find the hidden cave",
    ),
    "tree": ("oak", "willow", "pine", "birch", "maple", "apple tree"),
    "bird": ("a robin", "an owl", "a lark", "a sparrow", "a dove", "a swallow"),
    "smell": ("rain", "roses", "fresh bread", "honey", "hay", "smoke"),
    "hazard": ("the mud", "a deep hole", "the cold water", "a pile of leaves", "a thorny bush", "a dusty ditch"),
    "beast": ("puppy", "kitten", "goose", "pony", "lamb", "piglet", "frog"),
    "stumble": ("root", "stone", "bucket", "log", "broom"),
    "barrier": ("high wall", "locked gate", "wide stream", "steep path", "thick hedge"),
    "worker": ("baker", "farmer", "sailor", "painter", "doctor", "shepherd", "gardener"),
    "long": ("all day", "all morning", "for an hour", "for a long time", "until dark"),
    "so": ("then", "so", "soon", "at once", "after that", "a moment later"),
    "finally": ("in the end", "at last", "that night", "later that day", "when evening came", "finally"),
    "glad": ("happy", "proud", "calm", "brave", "thankful", "cheerful", "safe", "loved"),
    "gloomy": ("sad", "angry", "afraid", "lonely", "ashamed", "tired", "hurt", "bitter"),
    "light": ("warm", "light", "full", "at peace"),
    "dull": ("cold", "heavy", "empty", "in pain"),
    "nice": ("kind", "friendly", "gentle", "patient"),
    "mean": ("rude", "nasty", "cruel", "grumpy"),
    "delight": ("laughter", "music", "light", "joy", "dancing"),
    "gloom": ("silence", "shadows", "rain", "sorrow", "darkness"),
}  # fmt: skip

# --- openings ---------------------------------------------------------------------------------------------------------
# {hero} is the bare name, {the_hero} and {a_hero} are the two ways to tell it first; {she} {her} {poss} {self} are the
# pronouns of the hero (subject, object, possessive, reflexive), whichever the gender. All that the continuations speak
# of (thing, food, friend, place) is told in the opening, so that a reader can foresee it.

_SCENES = (
    "{when}, {the_hero} went to the {place}.",
    "{when}, {the_hero} woke up and ran to the {place}.",
    "it was {weather}, and {the_hero} sat {at_place}.",
    "there was once {a_hero} who lived {at_place}.",
    "{the_hero} came to the {place} every week to rest.",
    "{when}, {the_hero} was {doing} {at_place}.",
    "long ago, {a_hero} lived near the {place}.",
    "nobody knew the {place} as well as {the_hero} did.",
)
_BELONGINGS = (
    "{she} carried {a_thing} and {count} {food} in {poss} bag.",
    "in {poss} hands {she} held {a_thing} and {count} {food}.",
    "{poss} mother had given {her} {a_thing} and {count} {food}.",
    "{she} had made {a_thing} all by {self}, and eaten {count} {food}.",
    "under {poss} arm was {a_thing}, and {poss} pockets were full of {food}.",
    "{she} had traded {count} {food} for {a_thing}.",
    "what {she} loved most were {food} and {poss} {look} {thing}.",
)
_MEETINGS = (
    "{poss} {relation} {friend} came along.",
    "{she} met {poss} {relation} {friend} on the way.",
    "{poss} {relation} {friend} was already there, {doing}.",
    "{friend}, {poss} {relation}, was {doing} nearby.",
    "{she} waited for {poss} {relation}, who was called {friend}.",
    "behind {her} walked {poss} {relation} {friend}, {doing}.",
)
_GOALS = (
    "{hero} wanted to show the {thing} to {friend}.",
    "they had planned to {plan} together.",
    "{hero} hoped to {plan} before dark.",
    '"let us {plan}," said {hero}.',
    '"I would like to {plan}," said {friend}.',
    '"I like your {look} {thing}!" said {friend}.',
)
_DETAILS = (
    "the air smelled of {smell}.",
    "{bird} sang in the tall {tree}.",
    "the wind was blowing over the {place}.",
    "it had been raining {long}.",
    "far away, a bell was ringing.",
)

# --- continuations ----------------------------------------------------------------------------------------------------

_TROUBLES = (
    "but the {thing} slipped and fell into {hazard}.",
    "{so} a strong wind blew the {thing} into {hazard}.",
    "{so} {hero} could not find the {thing} anywhere.",
    "{hero} tripped over a {stumble} and dropped the {thing}.",
    "{so} it was time to eat, but {hero} had no {food} left.",
    '"may I hold the {thing}?" asked {friend}.',
    '"may I have some {food}?" asked {friend}.',
    "{so} {friend} saw a crack in the {look} {thing}.",
    "{so} a {beast} ran up and took the {thing}.",
    "{so} they came to a {barrier} and had to stop.",
    "dark clouds came, and rain fell on the {place}.",
    "{so} {hero} heard a {beast} crying behind the {tree}.",
    "{friend} looked at the {thing} {long}.",
    "{so} a {worker} came by and asked about the {thing}.",
)

# Each entry is a happy sentence and its sad twin. The twins share their frame and their length, so that neither mood is
# cheaper to say; the drawn words come from lists of equal size.
_TURNS = (
    ("{friend} smiled and took {poss} hand.", "{friend} frowned and pushed {her} away."),
    ("{friend} gave {her} half of the {food}.", "{friend} ate all of the {food} alone."),
    ("{hero} shared the {thing} with {friend}.", "{hero} hid the {thing} from {friend}."),
    ('"I will help you," said {friend}.', '"I will not help," said {friend}.'),
    ("{friend} worked {long} to mend the {thing}.", "{friend} tried {long} to break the {thing}."),
    ("they hugged each other and tried again.", "they shouted at each other and gave up."),
    ("{hero} said sorry, and {friend} forgave {her}.", "{hero} said sorry, but {friend} mocked {her}."),
    ("a {nice} {worker} stopped and helped them {long}.", "a {mean} {worker} stopped and scolded them {long}."),
    ("{friend} waited for {hero} {at_place}.", "{friend} ran from {hero} {at_place}."),
    ("{friend} told {her} a joke about the {thing}.", "{friend} told {her} a lie about the {thing}."),
    ("{hero} thanked {friend} for the {food}.", "{hero} blamed {friend} for the {food}."),
    ("{friend} cleaned the {thing} and gave it back.", "{friend} scratched the {thing} and threw it away."),
    ('"you are my best {relation}!" said {hero}.', '"you are my worst {relation}!" said {hero}.'),
    ('"you may keep the {thing}," said {friend}.', '"you may not have the {thing}," said {friend}.'),
)
_FEELINGS = (
    ("{hero} felt {glad} and {glad}.", "{hero} felt {gloomy} and {gloomy}."),
    ("{poss} heart was {light}.", "{poss} heart was {dull}."),
    ("that made {friend} feel {glad}.", "that made {friend} feel {gloomy}."),
    ("{hero} laughed, and {friend} looked {glad}.", "{hero} cried, and {friend} looked {gloomy}."),
    ("it was a {nice} thing to do.", "it was a {mean} thing to do."),
    ("{hero} danced around the {tree} {long}.", "{hero} wept under the {tree} {long}."),
)
_ENDINGS = (
    ("{finally}, they walked home hand in hand.", "{finally}, {she} walked home all alone."),
    ("{finally}, {hero} fell asleep with a smile.", "{finally}, {hero} fell asleep in tears."),
    (
        "from that day on, {hero} and {friend} were best friends.",
        "from that day on, {hero} and {friend} were bitter enemies.",
    ),
    ("the {look} {thing} was safe, and everyone cheered.", "the {look} {thing} was lost, and nobody cared."),
    ("{finally}, the {place} was filled with {delight}.", "{finally}, the {place} was filled with {gloom}."),
    ("{finally}, {hero} and {friend} felt {glad} again.", "{finally}, {hero} and {friend} felt {gloomy} again."),
    ("{hero} kept the {look} {thing} and treasured it.", "{hero} lost the {look} {thing} and missed it."),
    ("{finally}, they ate the {food} and sang.", "{finally}, they threw the {food} and fought."),
    ("{friend} came to visit {her} every day.", "{friend} never came to visit {her} again."),
    ("and everyone {at_place} sang along.", "and everyone {at_place} went away."),
)


def stories(n: int, seed: int) -> list[str]:
    """``n`` whole stories of 40 to 100 words, of either mood with equal chance; the same ``seed``, the same stories.

    Example:
        >>> len(stories(3, seed=1))
        3
    """
    rng = random.Random(f"stories {seed}")  # a string, so that pairs of the same seed are drawn from another stream
    texts = []
    for _ in range(n):
        cast = _draw_cast(rng)
        mood: Mood = rng.choice(("happy", "sad"))
        texts.append(_opening(rng, cast) + _continuation(rng, cast, mood, _trouble(rng, cast)))
    return texts


def preference_pairs(n: int, seed: int) -> list[dict[str, str]]:
    """``n`` preference pairs in TRL's explicit-prompt format, all of them stories of the grammar of :func:`stories`.

    ``prompt`` is an opening, ``chosen`` a happy continuation of it and ``rejected`` a sad one. A continuation starts
    with a space, so that no token spans the boundary. Lengths differ from pair to pair and within a pair; half of the
    pairs tell of the same trouble (or of none) in both continuations, so that many share more than the prompt.
    """
    rng = random.Random(f"pairs {seed}")
    pairs = []
    for _ in range(n):
        cast = _draw_cast(rng)
        prompt = _opening(rng, cast)
        trouble = _trouble(rng, cast)
        rejected_end = trouble if rng.random() < 0.5 else _trouble(rng, cast)
        chosen, rejected = _continuation(rng, cast, "happy", trouble), _continuation(rng, cast, "sad", rejected_end)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def _draw_cast(rng: random.Random) -> dict[str, str]:
    """What stays the same throughout one story, by the name of its field."""
    hero_gender, friend_gender = rng.choice(("she", "he")), rng.choice(("she", "he"))
    hero, friend = rng.choice(_NAMES[hero_gender]), rng.choice(_NAMES[friend_gender])
    while friend == hero:
        friend = rng.choice(_NAMES[friend_gender])
    kind = rng.choice((*_KINDS, "girl" if hero_gender == "she" else "boy"))
    she, her, poss, self_ = _PRONOUNS[hero_gender]
    thing, look = rng.choice(_THINGS), rng.choice(_LOOKS)
    preposition, place = rng.choice(_PLACES)
    return {
        "hero": hero,
        "the_hero": rng.choice((hero, f"{hero} the {kind}", f"little {hero}")),
        "a_hero": f"{_with_article(kind)} named {hero}",
        "she": she,
        "her": her,
        "poss": poss,
        "self": self_,
        "friend": friend,
        "relation": rng.choice(_RELATIONS[friend_gender]),
        "thing": thing,
        "look": look,
        "a_thing": _with_article(f"{look} {thing}"),
        "food": rng.choice(_FOODS),
        "count": rng.choice(_COUNTS),
        "place": place,
        "at_place": f"{preposition} the {place}",
    }


def _opening(rng: random.Random, cast: dict[str, str]) -> str:
    """Three to five sentences that tell of the hero, the place, the thing, the food and the friend."""
    templates = [rng.choice(_SCENES)]
    if rng.random() < 0.4:
        templates.append(rng.choice(_DETAILS))
    templates += rng.sample([rng.choice(_BELONGINGS), rng.choice(_MEETINGS)], 2)
    if rng.random() < 0.5:
        templates.append(rng.choice(_GOALS))
    return " ".join(_render(template, rng, cast) for template in templates)


def _trouble(rng: random.Random, cast: dict[str, str]) -> str:
    """What sets the continuation going, in neither mood; empty for a third of the stories."""
    return "" if rng.random() < 1 / 3 else " " + _render(rng.choice(_TROUBLES), rng, cast)


def _continuation(rng: random.Random, cast: dict[str, str], mood: Mood, trouble: str) -> str:
    """``trouble``, then sentences of one mood, three to five in all; starts with a space."""
    twins = rng.sample(_TURNS, rng.choice((1, 2)) if trouble else 2)
    if rng.random() < 0.5:
        twins.append(rng.choice(_FEELINGS))
    if len(twins) + bool(trouble) < 3 or rng.random() < 0.7:
        twins.append(rng.choice(_ENDINGS))
    side = 0 if mood == "happy" else 1
    return trouble + "".join(" " + _render(pair[side], rng, cast) for pair in twins)


def _render(template: str, rng: random.Random, cast: dict[str, str]) -> str:
    """Fill in a sentence, from the cast or else with a word drawn anew, and capitalize its first letter."""
    drawn: set[str] = set()

    def fill(match: re.Match[str]) -> str:
        field = match.group(1)
        if field in cast:
            return cast[field]
        word = rng.choice([word for word in _WORDS[field] if word not in drawn])  # "sad and sad" would read oddly
        drawn.add(word)
        return word

    sentence = re.sub(r"\{(\w+)\}", fill, template)
    start = 1 if sentence.startswith('"') else 0
    return sentence[:start] + sentence[start].upper() + sentence[start + 1 :]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
