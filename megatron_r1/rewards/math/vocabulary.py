"""The words that matter around an answer, as tables. What is done with them is in words.py."""

from __future__ import annotations

FUNCTION_WORDS = frozenset(
    "is are was be it the an of so to we he she in on at no yes not if as by my its has had for all any you they "
    "ans this that thus hence and then only also now our out per one get got she her his".split()
)
"""Words of two and three letters that are no product of variables."""

NOUNS = frozenset(
    "cup cat dog egg pen car man men day bag box boy toy hat bus row way pie job cow hen pig fox bed can jar ton sec "
    "bar lap mug ice tie fan pan pot sum kid fee leg map net pin set tub van web win son pea nut bun jam tea "
    "ham".split()
)
"""Words of three letters that are counted: `5 cup` is no product."""

NUMERALS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion "
    "quadrillion zillion dozen gross lakh crore mil mln mn bn tn bil tril point half halve quarter third fourth fifth "
    "sixth seventh eighth ninth tenth twelfth hundredth thousandth millionth billionth permille percentage percent "
    "twice thrice double triple quadruple".split()
)
NEGATIONS = frozenset(
    "no not non nor none never neither cannot cant isnt wasnt arent dont doesnt without except unless wrong false "
    "incorrect instead".split()
)
BEFORE = frozenset(
    "minus negative neg plus or versus vs between than least most less more fewer over under above below almost nearly "
    "inverse reciprocal opposite imaginary root factorial maybe perhaps either "
    "exceeding exceeds multiple divisor square cube log logarithm cosine sine tangent negation differs different far "
    "but before after past until decrease loss nobody anything".split()
).union(NEGATIONS, NUMERALS)
"""Words that make another number of the one after them, or say that it is not the answer. Plurals count too."""

AFTER = frozenset(
    "minus plus or versus vs between than least most less fewer under above below squared cubed root factorial "
    "multiplied divided times mod modulo imaginary base repeating hexadecimal hex octal binary score".split()
).union(NEGATIONS, NUMERALS - frozenset(["double", "triple", "quadruple", "twice", "thrice"]))
"""Words that make another number of the one before them, or take it back."""

UNIT_LETTERS = frozenset("mgshLlNJWVACFTHd")
"""Letters that are a unit in \\text{} or \\mathrm{}; others are variables, or thousands (k) and millions (M)."""

UNITS = (
    "cm mm km dm nm kg mg mL ml kW MW mW GW kWh Hz kHz mHz MHz GHz kJ MJ mJ eV keV MeV GeV kPa MPa Pa mol min hr "
    "hrs sec ft lb lbs oz mph kmh rpm mV kV mA kA ms ns cc gal yd rad deg rev dB atm pm am ohm KM CM MM KG ML "
    "km/h m/s".split()
)
"""Units that are known without \\text{}. One letter alone (`5 m`) may be a variable."""
