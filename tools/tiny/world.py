"""The facts of the tiny world: who lives in it, where, and with what. Every generator draws from here."""

# ruff: noqa: SIM905 (a long list of words reads best as one string, split)

from __future__ import annotations

GIRLS = (
    "Mia Lily Anna Rosa Emma Zoe Nora Ivy Ruby Clara Ella Luna Maya Sara Eva Lucy Alice Daisy Hana Nina "
    "Olive Pearl Tara Wendy Yara Elsa Freya Gina Holly Iris Jane Kate Leah Molly Nell Paula Rita Sofia "
    "Tess Vera Amara Bella Carmen Dora Fatima Grace Heidi Ingrid Julia Kiki"
).split()
BOYS = (
    "Tom Ben Max Leo Sam Finn Jack Omar Noah Oscar Pip Theo Hugo Ivan Adam Carl David Eli Felix George "
    "Henry Igor Jonas Kai Liam Milo Nico Otto Paul Quinn Ravi Simon Toby Uri Victor Will Yusuf Zack Alan "
    "Bruno Cody Dan Emil Frank Gus Hans Jamal Karl Luca Marco"
).split()

# kind: (sound, home, colour, food, young one's name, legs, can fly, can swim, size rank)
ANIMALS: dict[str, tuple[str, str, str, str, str, int, bool, bool, int]] = {
    "ant": ("makes no sound", "an anthill", "black", "crumbs", "larva", 6, False, False, 1),
    "bee": ("buzzes", "a hive", "yellow and black", "nectar", "larva", 6, True, False, 2),
    "mouse": ("squeaks", "a hole", "grey", "cheese", "pup", 4, False, True, 4),
    "frog": ("croaks", "a pond", "green", "flies", "tadpole", 4, False, True, 5),
    "bird": ("sings", "a nest", "blue", "seeds", "chick", 2, True, False, 6),
    "squirrel": ("chatters", "a tree", "red", "nuts", "kit", 4, False, False, 7),
    "hedgehog": ("snuffles", "a pile of leaves", "brown", "worms", "hoglet", 4, False, True, 8),
    "owl": ("hoots", "an old tree", "brown", "mice", "owlet", 2, True, False, 9),
    "duck": ("quacks", "a pond", "white", "bread", "duckling", 2, True, True, 10),
    "rabbit": ("makes little sound", "a burrow", "white", "carrots", "kit", 4, False, False, 11),
    "cat": ("meows", "a house", "grey", "fish", "kitten", 4, False, False, 12),
    "fox": ("barks", "a den", "red", "berries", "cub", 4, False, True, 13),
    "penguin": ("honks", "the ice", "black and white", "fish", "chick", 2, False, True, 14),
    "dog": ("barks", "a house", "brown", "bones", "puppy", 4, False, True, 15),
    "goat": ("bleats", "a farm", "white", "grass", "kid", 4, False, False, 16),
    "sheep": ("bleats", "a farm", "white", "grass", "lamb", 4, False, False, 17),
    "wolf": ("howls", "the forest", "grey", "meat", "pup", 4, False, True, 18),
    "pig": ("oinks", "a farm", "pink", "apples", "piglet", 4, False, True, 19),
    "lion": ("roars", "the plains", "golden", "meat", "cub", 4, False, False, 20),
    "bear": ("growls", "a cave", "brown", "honey", "cub", 4, False, True, 21),
    "cow": ("moos", "a farm", "black and white", "grass", "calf", 4, False, False, 22),
    "horse": ("neighs", "a stable", "brown", "hay", "foal", 4, False, True, 23),
    "elephant": ("trumpets", "the plains", "grey", "leaves", "calf", 4, False, True, 24),
    "whale": ("sings", "the sea", "blue", "tiny shrimp", "calf", 0, False, True, 25),
}

# Those that can walk about in a story and hold things.
STORY_ANIMALS = (
    "mouse frog squirrel hedgehog owl duck rabbit cat fox penguin dog goat sheep wolf pig lion bear horse elephant bird"
).split()

# place: (preposition phrase, something that lives or stands there)
PLACES: dict[str, tuple[str, str]] = {
    "forest": ("in the forest", "the tall trees"),
    "beach": ("at the beach", "the soft sand"),
    "garden": ("in the garden", "the flowers"),
    "park": ("in the park", "the green grass"),
    "farm": ("on the farm", "the old barn"),
    "village": ("in the village", "the little houses"),
    "river": ("by the river", "the smooth stones"),
    "lake": ("by the lake", "the tall reeds"),
    "mountain": ("on the mountain", "the high rocks"),
    "meadow": ("in the meadow", "the yellow flowers"),
    "market": ("at the market", "the fruit stands"),
    "island": ("on the island", "the palm trees"),
    "castle": ("in the castle", "the stone walls"),
    "hill": ("on the hill", "the long grass"),
    "school": ("at the school", "the big door"),
    "library": ("in the library", "the tall shelves"),
    "valley": ("in the valley", "the apple trees"),
    "harbor": ("at the harbor", "the fishing boats"),
}

# object: what one does with it, after "to"
OBJECTS: dict[str, str] = {
    "kite": "fly it in the wind",
    "ball": "kick it high",
    "drum": "play a song on it",
    "lantern": "light up the night",
    "boat": "sail it on the water",
    "book": "read it aloud",
    "bell": "ring it in the morning",
    "hat": "wear it in the sun",
    "cake": "share it with friends",
    "map": "look for treasure",
    "key": "open a secret door",
    "shell": "listen to the sea",
    "flute": "play a soft tune",
    "basket": "fill it with berries",
    "umbrella": "stay dry in the rain",
    "scarf": "keep warm in winter",
    "coin": "make a wish",
    "feather": "tickle a friend",
    "mirror": "catch the sunlight",
    "wagon": "pull it up the road",
    "blanket": "keep warm at night",
    "button": "sew it on a coat",
    "ring": "wear it every day",
    "puppet": "put on a show",
}

COLORS = "red blue green yellow orange purple white black pink brown silver golden".split()
TRAITS = "little brave kind shy clever happy curious gentle quiet cheerful young funny".split()
CITIES = (
    "Paris London Rome Berlin Madrid Oslo Cairo Tokyo Lima Dublin Vienna Prague Athens Lisbon Warsaw Delhi "
    "Sydney Boston Chicago Toronto Havana Nairobi Seoul Geneva Munich Milan Quito Bogota Helsinki Copenhagen "
    "Denver Dallas Seattle Austin Kyoto Hamburg Porto Naples Ghent Basel"
).split()
JOBS = (
    "teacher doctor baker farmer pilot nurse painter singer cook driver gardener writer dentist builder sailor "
    "tailor waiter judge miner potter"
).split()
PETS = "cat dog rabbit parrot hamster turtle goldfish pony mouse lizard".split()
FOODS = (
    "pizza soup rice bread pasta salad cheese apples bananas cookies noodles honey pancakes berries".split()
)
HOBBIES = "chess swimming reading painting dancing singing cooking hiking fishing running knitting gardening".split()

THING_COLORS = {
    "the sky": "blue", "grass": "green", "the sun": "yellow", "snow": "white", "coal": "black",
    "a tomato": "red", "a carrot": "orange", "a banana": "yellow", "a lemon": "yellow", "chocolate": "brown",
    "milk": "white", "a strawberry": "red", "an orange": "orange", "a leaf": "green", "the sea": "blue",
    "a frog": "green", "a grape": "purple", "the night": "black", "a cherry": "red", "a flamingo": "pink",
}  # fmt: skip
MIXED_COLORS = {
    ("red", "blue"): "purple", ("red", "yellow"): "orange", ("blue", "yellow"): "green",
    ("red", "white"): "pink", ("black", "white"): "grey",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "happy": "sad", "fast": "slow", "wet": "dry",
    "old": "young", "open": "closed", "full": "empty", "loud": "quiet", "hard": "soft", "light": "dark",
    "tall": "short", "early": "late", "near": "far", "left": "right", "good": "bad", "clean": "dirty", "thick": "thin",
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()
SHAPES = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "octagon": 8, "rectangle": 4}


def article(noun: str) -> str:
    """Returns the noun phrase with "a" or "an" before it."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun
