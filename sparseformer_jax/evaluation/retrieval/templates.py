"""All text of the retrieval tasks: what is asked, what is hidden, and what it is hidden in.

Short, so that a few hundred tokens hold a task even where a token is a byte. What is hidden, and
every sentence, ends with the space before the next.
"""

PASSKEY_HEAD = "A pass key is hidden in this text. Remember it.\n"
PASSKEY = "The pass key is {value}. Remember it. {value} is the pass key. "
PASSKEY_TAIL = "\nWhat is the pass key? The pass key is"

NEEDLE_HEAD = "A number is hidden in this text. Remember it.\n"
MULTI_KEY_HEAD = "Remember the numbers in this text.\n"
NEEDLE = "The number of {key} is {value}. "
NEEDLE_TAIL = "\nWhat is the number of {key}? The number of {key} is"

VARIABLES_HEAD = "Variables are assigned in this text. Follow them.\n"
ASSIGNMENT = "VAR {name} = {value}. "
VARIABLES_TAIL = "\nWhich variables have the value {value}? They are"

COMMON_WORDS_HEAD = "Some words of this list occur often.\n"
COMMON_WORD = "{word} "
COMMON_WORDS_TAIL = "\nWhich {number} words occur most often? They are"

# As a continuation begins that gives all answers and nothing else.
ANSWER = " {answers}."
ANSWER_SEPARATOR = ", "

# The haystack of Mohtashami and Jaggi 2023 (arXiv 2305.16300), which RULER calls noise.
NOISE = (
    "The grass is green. ",
    "The sky is blue. ",
    "The sun is yellow. ",
    "Here we go. ",
    "There and back again. ",
)

# A haystack of sentences that hardly repeat; no word of it is a key, and none has a digit.
SENTENCES = (
    "The {adjective} {person} {verb} the {thing}. ",
    "{place} the {person} {verb} a {adjective} {thing}. ",
    "A {person} {verb} the {adjective} {thing} {time}. ",
    "{place} nobody {verb} the {thing} {time}. ",
)
ADJECTIVES = (
    "old",
    "tall",
    "quiet",
    "young",
    "busy",
    "brave",
    "clever",
    "gentle",
    "proud",
    "tired",
)
PERSONS = ("baker", "farmer", "sailor", "doctor", "painter", "teacher", "miller", "tailor", "guide")
VERBS = ("found", "carried", "painted", "forgot", "sold", "mended", "hid", "praised", "lost", "saw")
THINGS = ("lamp", "basket", "ladder", "kettle", "mirror", "blanket", "wagon", "violin", "letter")
PLACES = ("In the village", "By the river", "On the hill", "At the market", "In the garden")
TIMES = ("at noon", "in spring", "after dark", "on Monday", "before dawn", "last year")

KEYS = (
    *("amber", "apple", "basil", "bread", "cedar", "chalk", "clover", "coal", "copper", "coral"),
    *("cotton", "flint", "ginger", "gold", "grape", "honey", "iron", "ivory", "jade", "lead"),
    *("lemon", "lime", "linen", "maple", "marble", "mint", "olive", "onyx", "pearl", "pepper"),
    *("plum", "quartz", "rice", "ruby", "salt", "sand", "silk", "silver", "slate", "sugar"),
)

# Names of variables, which no text contains by chance, and words that are none.
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
