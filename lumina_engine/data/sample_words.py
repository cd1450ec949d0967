"""Words and small facts of the built-in corpus."""

from __future__ import annotations

# Words in capitals are spelled, reversed and picked apart letter by letter: 3 to 5 letters, none twice in a word.
LETTER_WORDS = tuple(
    """
    act age aim air ant ape apt arc ark arm art ash ask axe bad bag ban bar bat bay bed beg bet bid big bin bit bow box
    boy bud bug bun bus but buy cab cap car cat cod cot cow cry cub cup cut dam day den dew dig dim dip dog dot dry due
    dug ear eat ego elk elm end era fan far fat fed few fig fin fir fit fix fly fog fox fry fun fur gap gas gem get gin
    got gum gun gut guy ham hat hay hen her hid him hip his hit hog hop hot how hub hug hum hut ice ink ion jam jar jaw
    jet jib job jog jot joy jug key kid kin kit lab lad lap law lay leg let lid lie lip lit log lot low mad man map mat
    may men met mix mob mop mud mug nap net new nib nod nor not now nut oak oar oat oil old one orb ore our out owl own
    pad pan pat paw pay pea peg pen pet pie pig pin pit pod pot pub put rag ram ran rap rat raw ray red rib rid rig rim
    rip rob rod rot row rub rug run rye sad sap sat saw say sea set shy sip sir sit six sky sob son sow spa spy sun tab
    tag tan tap tar tax tea ten tie tin tip toe ton top toy try tub tug two urn use van vat vet vow war was wax way web
    wed wet who wig win wit won yak yam yes yet zip
    able acid aids arch army atom aunt back bake band bank barn base bath beam bean bear belt bike bird blow blue boat
    body bold bone born bowl bulk burn bush busy cage cake calm camp card care cart case cash cave chin city clap clay
    clip club coal coat code coin cold cord core corn cost crab crew crop cube damp dark dart dawn deal dear desk dial
    dime dirt dish dive dock does dome done dove down drag draw drop drum duck dust duty each earn east easy envy exit
    face fact farm fast fern file film find fine fire firm fish five flag flat flow foam fold fork form fort four frog
    from fuel gain game gate gift girl give glad goal goat gold golf gone gray grew grid grip grow gulf hair half hand
    hard harm hawk heal heat help herb hero hide hint hire hold hole home horn host hour huge hunt hurt idea inch iron
    jail join joke jump june jury just keys kind king kite knot lace lady lake lamb lamp land lane last late lawn lead
    leaf left lens life lift like lime line link lion list live load loan lock long lord lose lost loud love luck lung
    made mail main make many mark mask meal mean meat melt menu mile milk mind mine mint mist mode mole moth move much
    myth nail name navy near neck nest next nice nose note oath obey oven over pack page pain pair palm park part past
    path peak pear pick pile pine pink pint plan play plot plum plus poem poet pole port pose post pour pray rack raft
    rail rain rank rate read rest rice rich ride ring rise risk road robe rock role rope rose ruby rule rush safe said
    sail salt same sand save scar seal seat self send shed ship shoe shop shot show sign silk sing sink site size skin
    slow snow soap soft soil sold sole some song sort soul soup spin spot star stay stem step stop such suit sure swim
    tail take tale talk tank tape task taxi team tear tend than thin tide tidy time tiny tire toad tone torn tour town
    trap tray trim trip true tube tune turn twig twin type unit upon vase vast verb very vine vote wage wait wake walk
    wand warm wash wave weak wear west when whip wide wife wild wind wine wing wipe wire wise wish wolf word work worm
    yard yarn year zero zone
    about actor adult after agent angle apron audio badge baker beach bench black blame blind block board brain brave
    bread brick bride brief bring brown brush cabin chair chalk charm chart chest chief child claim clean clear climb
    cloud clown coast count court cover craft crane crown daily dance depth diary dough dozen draft drain dream drink
    drive early earth eight equal exact extra faint faith false field fight final first flame float flour flute focus
    forty found frame fresh front fruit ghost giant glove grade grain grand grape great group guard guest guide heart
    honey horse hotel house human image joint judge juice knife large laugh learn lemon light lunch magic major maple
    march match medal metal minor month motel mount mouse mouth movie music night noble noise north novel nurse ocean
    olive orbit organ other ought ounce paint panel party patch peach pearl phone piano pilot pitch place plain plane
    plant plate point pound power price pride prize proud quick quiet radio ranch reach right rival robin rough round
    route royal scale scarf score shade shape share shark sharp shelf shine shirt shore short sixty slope smart smile
    smoke snake solid sound south space spark speak spice spoke sport stain stamp stand steak steam stick stock stone
    storm story style sugar swing sword table thick thing think third throw tiger today tower trace track trade trail
    train tribe trick truck trunk uncle under vapor video voice waist watch water weigh whale wheat white whole woman
    world worth wrist write yield young
    """.upper().split()
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
SEASONS = {"spring": "summer", "summer": "autumn", "autumn": "winter", "winter": "spring"}

# phrasings of the question, how far it is, and the answer
DAY_ASKED = (
    (
        ("What day comes after {d}?", "Which day follows {d}?", "If today is {d}, what day is tomorrow?",
         "Name the day after {d}.", "It is {d}. What day is it tomorrow?"),
        1, "The day after {d} is {c}.",
    ),
    (
        ("What day comes before {d}?", "If today is {d}, what day was yesterday?", "Name the day before {d}.",
         "It is {d}. What day was it yesterday?"),
        -1, "The day before {d} is {c}.",
    ),
    (
        ("What day is two days after {d}?", "If today is {d}, what day is it in two days?",
         "It is {d}. What day will it be in two days?"),
        2, "Two days after {d} is {c}.",
    ),
    (
        ("What day is three days after {d}?", "If today is {d}, what day is it in three days?",
         "It is {d}. What day will it be in three days?"),
        3, "Three days after {d} is {c}.",
    ),
)  # fmt: skip
MONTH_ASKED = (
    (
        ("What month comes after {d}?", "Which month follows {d}?", "Name the month after {d}.",
         "It is {d}. What is the next month?"),
        1, "The month after {d} is {c}.",
    ),
    (
        ("What month comes before {d}?", "Name the month before {d}.", "It is {d}. What was the last month?",
         "Which month is just before {d}?"),
        -1, "The month before {d} is {c}.",
    ),
    (
        ("What month is two months after {d}?", "It is {d}. What month will it be in two months?",
         "Name the month two months after {d}."),
        2, "Two months after {d} is {c}.",
    ),
)  # fmt: skip
CLOCK = (
    "It is {h} o'clock. What time is it in {k} hours?", "What time is {k} hours after {h} o'clock?",
    "At {h} o'clock I leave and walk for {k} hours. What time is it then?",
)  # fmt: skip

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Maria", "Nina", "Oscar",
    "Paul", "Rosa", "Sam", "Tom", "Vera", "Will", "Zoe",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "orange", "purple")
THINGS = (
    "ball", "cup", "hat", "book", "car", "bag", "chair", "pen", "box", "lamp", "coat", "bike", "key", "boat", "kite", "drum",
)  # fmt: skip
PLACES = ("kitchen", "garden", "school", "park", "library", "office", "shop", "station", "museum", "hotel", "garage", "cinema")
LIST_WORDS = (
    "apple", "bread", "cat", "door", "egg", "fish", "goat", "house", "ice", "juice", "king", "lion", "moon", "nest", "owl",
    "pear", "queen", "rain", "sun", "tree", "uncle", "wind", "yard", "zebra", "milk", "rice", "salt", "soup", "tea", "wolf",
)  # fmt: skip

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Ireland": "Dublin", "Japan": "Tokyo",
    "China": "Beijing", "India": "Delhi", "Egypt": "Cairo", "Russia": "Moscow", "Canada": "Ottawa", "Cuba": "Havana",
    "Peru": "Lima", "Turkey": "Ankara",
}  # fmt: skip
YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "goat": "kid", "pig": "piglet",
    "duck": "duckling", "hen": "chick", "bear": "cub", "frog": "tadpole", "deer": "fawn",
}  # fmt: skip
COLOUR_OF = {
    "grass": "green", "snow": "white", "coal": "black", "blood": "red", "a lemon": "yellow", "the sky": "blue",
    "chocolate": "brown", "a carrot": "orange", "a rose": "red", "milk": "white", "a banana": "yellow",
}  # fmt: skip
LEGS = {"dog": "4", "spider": "8", "bee": "6", "hen": "2", "snake": "0", "horse": "4", "ant": "6", "duck": "2", "fish": "0"}
# table, phrasings of the question, answer
FACTS: tuple[tuple[dict[str, str], tuple[str, ...], str], ...] = (
    (
        CAPITALS,
        (
            "What is the capital of {k}?", "Which city is the capital of {k}?", "Name the capital of {k}.",
            "Do you know the capital of {k}?", "Tell me the capital of {k}.", "I am going to {k}. What is its capital?",
        ),
        "The capital of {k} is {v}.",
    ),
    (
        {city: country for country, city in CAPITALS.items()},
        (
            "Which country has {k} as its capital?", "In which country is {k}?", "Where on the map is {k}?",
            "I am going to {k}. Which country is that?", "Do you know where {k} is?",
        ),
        "You find {k} in {v}.",
    ),
    (
        YOUNG,
        (
            "What is a young {k} called?", "What do you call a baby {k}?", "Name the young of a {k}.",
            "A baby {k} is called what?", "Tell me the word for a young {k}.",
        ),
        "A young {k} is a {v}.",
    ),
    (
        COLOUR_OF,
        ("What colour is {k}?", "Which colour does {k} have?", "Tell me the colour of {k}.", "Do you know the colour of {k}?"),
        "It is {v}.",
    ),
    (
        LEGS,
        (
            "How many legs does a {k} have?", "Count the legs of a {k}.", "A {k} has how many legs?",
            "Tell me the number of legs of a {k}.",
        ),
        "A {k} has {v} legs.",
    ),
)  # fmt: skip

_OPPOSITES = """
    hot cold, big small, tall short, old young, fast slow, happy sad, light dark, hard soft, full empty, rich poor, early late,
    open closed, high low, wet dry, clean dirty, strong weak, thick thin, loud quiet, good bad, near far, up down, left right,
    day night, black white, true false, sweet bitter, wide narrow, same different, first last, inside outside, above below,
    always never, begin end, win lose, buy sell, push pull, love hate
"""
OPPOSITES: dict[str, str] = {}
for _pair in _OPPOSITES.split(","):
    _one, _other = _pair.split()
    OPPOSITES.setdefault(_one, _other)
    OPPOSITES.setdefault(_other, _one)

# not graded: a chat begins and ends politely
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hello! How can I help you?"),
    ("Good morning.", "Hello! How can I help you?"),
    ("Who are you?", "I am Lumina, a small language model."),
    ("What is your name?", "I am Lumina, a small language model."),
    ("What can you do?", "I can count, spell, sort and tell you some facts."),
    ("Thank you!", "You are welcome."),
    ("Thanks a lot.", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("See you later.", "Goodbye!"),
)
