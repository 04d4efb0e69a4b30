"""Which reasoning-gym datasets may grade a model's answer.

Several of its scorers call `eval` or sympy's `parse_expr` on the answer, which would run a model's text as code.
So every scorer of one release was read, and only those that were found harmless are used; the arithmetic puzzles
are graded by rewards/gym.py instead. A test scans the installed source for evaluation and compares.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version

READ_VERSION = "0.1.25"
"""The release whose scorers were read; another one may evaluate answers where this one does not."""

READ = frozenset(
    """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion bf binary_alternation boxnet caesar_cipher
    calendar_arithmetic chain_sum circuit_logic color_cube_rotation count_bits count_primes course_schedule
    cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font
    fraction_simplification futoshiki game_of_life gcd graph_color group_anagrams isomorphic_strings jugs kakurasu
    knight_swap knights_knaves largest_island lcm leg_counting letter_counting letter_jumble list_functions
    mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid needle_haystack number_filtering number_format
    number_sequence palindrome_generation palindrome_partitioning path_star polynomial_equations pool_matrix
    power_function prime_factorization products quantum_lock ransom_note rearc rectangle_count rotate_matrix
    rotten_oranges rubiks_cube rush_hour self_reference sentence_reordering shortest_path simple_equations
    simple_geometry sokoban spell_backward string_manipulation string_splitting string_synthesis sudoku survo
    syllogism time_intervals tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles
    """.split()
)
"""Datasets whose scorer only compares, or reads the answer with int, float, Decimal, Fraction, json, numpy.loadtxt
(of lines, never of a path) or a regular expression, and whose module evaluates nothing."""

ANSWER_GRAMMARS: Mapping[str, re.Pattern[str]] = {
    # Their modules evaluate texts that they made themselves (a problem, the reference answer), never the answer.
    "basic_arithmetic": re.compile(r"[+-]?[0-9]{1,200}(?:\.[0-9]{1,200})?"),
    "bitwise_arithmetic": re.compile(r"[+-]?(?:0x[0-9a-fA-F]{1,200}|[0-9]{1,200})"),
    "number_sorting": re.compile(r"\[[0-9.,'\"\s-]{0,4000}\]"),  # no NaN: its scorer takes a list of NaN as right
    "gsm_symbolic": re.compile(r"[0-9]{1,50}(?:\.[0-9]{1,50})?"),  # its scorer takes the first number, unsigned
    # Its parse_expr is its own parser of formulas.
    "propositional_logic": re.compile("[A-Z∧∨¬→↔() ]{1,500}"),
    # Evaluates nothing, but takes NaN as right.
    "complex_arithmetic": re.compile(r"[0-9.+\-ij() ]{1,200}"),
}
"""Datasets whose scorer sees only answers that match as a whole; any other answer is not right."""

ARITHMETIC = frozenset({"countdown", "puzzle24"})
"""Puzzles graded by rewards/gym.py: their scorers evaluate the answer, and puzzle24's does not even ask whether
the given numbers were used."""

_EVALUATES = "its scorer runs the answer as Python code"
REFUSED: Mapping[str, str] = {
    "binary_matrix": _EVALUATES,
    "intermediate_integration": _EVALUATES,
    "n_queens": _EVALUATES,
    "polynomial_multiplication": _EVALUATES,
    "simple_integration": _EVALUATES,
    "spiral_matrix": _EVALUATES,
    "string_insertion": _EVALUATES,
    "codeio": "it makes its entries by running programs from a data file",
    "composite": "it hands answers to the scorers of other datasets; list those datasets one by one",
    "coin_flip": "its scorer takes 0 as right for every probability below 1",
    "game_of_life_halting": "its scorer takes every answer as right where the simulation halts",
}


def refusal(dataset: str) -> str | None:
    """Why `dataset` must not grade answers, with the remedy; None where it may."""
    if (installed := _installed()) != READ_VERSION:
        return (
            f"the scorers of reasoning-gym {READ_VERSION} were read and found safe, {installed} is installed; "
            f"install reasoning-gym=={READ_VERSION}"
        )
    if dataset in READ or dataset in ANSWER_GRAMMARS or dataset in ARITHMETIC:
        return None
    reason = REFUSED.get(dataset, "nobody has read whether its scorer runs answers as code")
    return f"the dataset {dataset} cannot grade a model's answers, because {reason}; choose another dataset"


def known_datasets() -> frozenset[str]:
    """Every dataset of the release that was read."""
    return READ | ANSWER_GRAMMARS.keys() | ARITHMETIC | REFUSED.keys()


def task_faults(lines: tuple[str, ...]) -> list[str]:
    """What is wrong with the dataset names of data.tasks, without importing reasoning-gym."""
    faults = []
    for line in lines:
        name = line.partition(":")[0].strip()
        if name not in known_datasets() and _installed() == READ_VERSION:
            close = difflib.get_close_matches(name, known_datasets(), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            faults.append(f"data.tasks: {name!r} is no reasoning-gym dataset{hint}")
        elif (reason := refusal(name)) is not None:
            faults.append(f"data.tasks: {line!r}: {reason}")
    return faults


@lru_cache(maxsize=1)
def _installed() -> str:
    return version("reasoning-gym")
