"""Words and sentence patterns of the arithmetic problems: words are shared by both splits, patterns by none.

{n} is the hero, {he} {him} {his} the pronouns, {other} someone of the other pronoun; {a} {b} {c} {x} are numbers that
matter, {d} one that does not. Patterns of one slot mean the same, so any can be swapped for any; those for test say
with training's words what training never says in that order.
"""

# Short words: a small vocabulary learned from technical text breaks "Wednesday" into five tokens.
MEN = ("Tom", "Ben", "Sam", "Jack", "Max", "Tim", "Dan", "Jim", "Alan", "Ray", "Ian", "Mark")
WOMEN = ("Ada", "Ann", "Alice", "Mary", "Grace", "Sue", "Lin", "Rose", "Ida", "Una", "Mia", "Emma")
THINGS = (
    *(("key", "keys"), ("card", "cards"), ("button", "buttons"), ("cookie", "cookies"), ("toy", "toys")),
    *(("map", "maps"), ("note", "notes"), ("tool", "tools"), ("car", "cars"), ("book", "books")),
    *(("coin", "coins"), ("stamp", "stamps"), ("apple", "apples"), ("cup", "cups"), ("ball", "balls")),
    *(("pen", "pens"), ("egg", "eggs"), ("stone", "stones"), ("ring", "rings"), ("pin", "pins")),
)
BOXES = (("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("case", "cases"), ("pack", "packs"))
PLACES = ("market", "park", "library", "beach", "station", "shop", "store", "lake")
EARLY_DAYS = ("Sunday", "Monday")
LATE_DAYS = ("Friday", "Saturday")
GAINED = ("found", "got", "bought", "received")
LOST = ("lost", "sold", "gave away")

PATTERNS = {
    "start": {
        "train": [
            "{n} had {a} {things}.",
            "There were {a} {things} in {n}'s {box}.",
            "{n} had {a} {things} at home.",
            "On {early_day} {n} had {a} {things}.",
            "{n} had a {box} with {a} {things}.",
        ],
        "test": [
            "In {n}'s {box} there were {a} {things}.",
            "At home {n} had {a} {things}.",
            "{n} had {a} {things} on {early_day}.",
            "{n} had {a} {things} in a {box}.",
        ],
    },
    "gain": {
        "train": [
            "{He} {gained} {x} more.",
            "Then {he} {gained} {x} more {things}.",
            "{other} gave {him} {x} {things}.",
            "{He} {gained} {x} {things} at the {place}.",
            "On {late_day} {he} {gained} another {x} {things}.",
            "{He} got {x} more from {other}.",
        ],
        "test": [
            "At the {place} {he} {gained} {x} more.",
            "Then {other} gave {him} {x} more {things}.",
            "{He} {gained} another {x} {things} on {late_day}.",
            "From {other} {he} got {x} {things}.",
        ],
    },
    "lose": {
        "train": [
            "{He} {lost} {x} of them.",
            "Then {he} {lost} {x} {things}.",
            "{He} gave {x} {things} to {other}.",
            "{He} {lost} {x} of the {things} at the {place}.",
            "On {late_day} {he} {lost} {x} {things}.",
        ],
        "test": [
            "At the {place} {he} {lost} {x} of them.",
            "Then {he} gave {other} {x} of the {things}.",
            "{He} {lost} {x} {things} on {late_day}.",
            "{He} gave {other} {x} {things} on {late_day}.",
        ],
    },
    "lose_of": {
        "train": [
            "{n} {lost} {x} of {his} {a} {things}.",
            "On {early_day} {n} {lost} {x} of {his} {a} {things}.",
            "{n} had {a} {things} but {lost} {x} of them.",
        ],
        "test": [
            "{n} {lost} {x} of {his} {a} {things} at the {place}.",
            "Of {his} {a} {things}, {n} {lost} {x}.",
            "{n} gave {other} {x} of {his} {a} {things}.",
        ],
    },
    "ask_now": {
        "train": [
            "How many {things} does {n} have now?",
            "How many {things} does {he} have now?",
            "How many {things} does {he} have in the end?",
        ],
        "test": [
            "Now how many {things} does {n} have?",
            "In the end, how many {things} does {he} have?",
            "How many {things} does {n} now have?",
        ],
    },
    "has": {
        "train": ["{n} has {a} {things}.", "There are {a} {things} in {n}'s {box}.", "{n} has {a} {things} at home."],
        "test": ["In {n}'s {box} there are {a} {things}.", "At home {n} has {a} {things}."],
    },
    "has_more": {
        "train": ["{other} has {x} more than {n}.", "{other} has {x} more {things} than {he} does."],
        "test": ["{other} has {x} {things} more than {n}.", "{other} has {x} more than {n} does."],
    },
    "has_fewer": {
        "train": ["{other} has {x} fewer than {n}.", "{other} has {x} fewer {things} than {he} does."],
        "test": ["{other} has {x} {things} fewer than {n}.", "{other} has {x} fewer than {n} does."],
    },
    "ask_other": {
        "train": ["How many {things} does {other} have?", "How many {things} are there in {other}'s {box}?"],
        "test": ["Now how many {things} does {other} have?", "In {other}'s {box}, how many {things} are there?"],
    },
    "both_have": {
        "train": [
            "{n} has {a} {things} and {other} has {b}.",
            "{n} has {a} {things}. {other} has {b} {things}.",
            "There are {a} {things} in {n}'s {box} and {b} in {other}'s.",
        ],
        "test": [
            "{n} has {a} {things} and {other} has {b} {things}.",
            "In {n}'s {box} there are {a} {things} and in {other}'s {b}.",
            "At home {n} has {a} {things}, and {other} has {b}.",
        ],
    },
    "ask_difference": {
        "train": [
            "How many more {things} does {n} have than {other}?",
            "How many more {things} does {n} have?",
            "How many fewer {things} does {other} have than {n}?",
        ],
        "test": [
            "How many more {things} than {other} does {n} have?",
            "How many fewer {things} does {other} have?",
            "{n} has how many more {things} than {other}?",
        ],
    },
    "ask_together": {
        "train": ["How many {things} do they have together?", "How many {things} do {n} and {other} have in all?"],
        "test": [
            "Together, how many {things} do they have?",
            "How many {things} do they have in all?",
            "How many {things} do {n} and {other} have together?",
        ],
    },
    "groups": {
        "train": [
            "{n} had {a} {boxes} with {b} {things} in each.",
            "There were {a} {boxes} with {b} {things} in each {box} at {n}'s home.",
            "{n} {gained} {a} {boxes} of {b} {things} each.",
        ],
        "test": [
            "At home {n} had {a} {boxes} with {b} {things} in each {box}.",
            "{n} {gained} {a} {boxes} with {b} {things} in each.",
            "{n} had {a} {boxes} of {b} {things} each.",
        ],
    },
    "groups_each_first": {
        "train": [
            "There were {b} {things} in each {box}, and {n} had {a} {boxes}.",
            "{n} {gained} {b} {things} every day for {a} days.",
            "{n} put {b} {things} in each of {a} {boxes}.",
        ],
        "test": [
            "In each {box} there were {b} {things}, and {n} had {a} {boxes}.",
            "Every day {n} {gained} {b} {things}, for {a} days.",
            "{n} had {b} {things} in each of {a} {boxes}.",
        ],
    },
    "ask_all": {
        "train": ["How many {things} were there in all?", "How many {things} is that in all?"],
        "test": ["In all, how many {things} were there?", "In all, how many {things} is that?"],
    },
    "price": {
        "train": ["One {thing} costs {b} cents.", "At the {place} a {thing} costs {b} cents."],
        "test": ["Each {thing} costs {b} cents at the {place}.", "For one {thing} {n} pays {b} cents."],
    },
    "ask_price": {
        "train": ["How many cents do {a} {things} cost?", "How many cents does {n} pay for {a} {things}?"],
        "test": ["For {a} {things}, how many cents does {n} pay?", "{n} buys {a} {things} for how many cents?"],
    },
    "money": {
        "train": [
            "{n} has {c} cents and buys {a} {things} for {b} cents each.",
            "{n} buys {a} {things} that cost {b} cents each, and pays with {c} cents.",
            "{n} had {c} cents. At the {place} {he} bought {a} {things} for {b} cents each.",
        ],
        "test": [
            "With {c} cents {n} buys {a} {things} for {b} cents each.",
            "At the {place} {n} buys {a} {things} that cost {b} cents each. {He} had {c} cents.",
        ],
    },
    "ask_money": {
        "train": ["How many cents are left?", "How many cents does {n} have left?"],
        "test": ["How many cents does {he} have in the end?", "Now how many cents are left?"],
    },
    "share": {
        "train": [
            "{n} shares {a} {things} equally among {b} friends.",
            "{n} puts {a} {things} into {b} {boxes}, the same number in each.",
            "{n} gives {a} {things} to {b} friends, the same number to each.",
        ],
        "test": [
            "Among {b} friends {n} shares {a} {things} equally.",
            "Into {b} {boxes} {n} puts {a} {things}, the same number in each {box}.",
            "{n} has {a} {things} and shares them equally among {b} friends.",
        ],
    },
    "share_all": {
        "train": [
            "Then {he} shares all of them equally among {b} friends.",
            "{He} puts them all equally into {b} {boxes}.",
        ],
        "test": ["Among {b} friends {he} shares all of them equally.", "Then {he} puts them equally into {b} {boxes}."],
    },
    "ask_each": {
        "train": ["How many {things} does each get?", "How many {things} go to each?"],
        "test": ["How many {things} is that for each?", "How many {things} do they each get?"],
    },
    "distract_person": {
        "train": ["{other} is {d} years old.", "{n} is {d} years old.", "{other} has {d} {other_things}."],
        "test": ["In {other}'s {box} there are {d} {other_things}.", "At home {other} has {d} {other_things}."],
    },
    "distract_place": {
        "train": [
            "The {place} is {d} miles away.",
            "It took {d} minutes to get to the {place}.",
            "There are {d} people at the {place}.",
        ],
        "test": [
            "It is {d} miles to the {place}.",
            "To get to the {place} it took {d} minutes.",
            "At the {place} there are {d} people.",
        ],
    },
}
