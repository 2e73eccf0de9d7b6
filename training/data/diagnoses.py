"""Decide whether a diagnosis or class name means melanoma, by an explicit vocabulary and without a default class.

`binary_class` knows the terms of the ISIC challenges and the ISIC Archive, HAM10000, PAD-UFES-20, DDI, BCN20000, derm7pt and
Fitzpatrick17k. For other terms it returns None, and the caller asks the user to map them.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

MALIGNANT: Literal["malignant"] = "malignant"
BENIGN: Literal["benign"] = "benign"
BinaryClass = Literal["malignant", "benign", ""]

_NO_DIAGNOSIS = frozenset({
    "na", "n a", "nan", "none", "null", "nil", "unknown", "unk", "unspecified", "undetermined", "indeterminate", "missing",
    "not available", "not applicable", "not specified", "unclassified",
})  # fmt: skip
_YES = frozenset({"1", "1.0", "true", "yes", "t", "y"})
_NO = frozenset({"0", "0.0", "false", "no", "f", "n"})

_MELANOMA_WORDS = frozenset({"melanoma", "melanomas", "mel", "lmm", "ssm"})
# Further terms that mean melanoma as a whole. Lentigo maligna is melanoma in situ.
_MELANOMA_TERMS = frozenset({"lentigo maligna", "alm", "nm"})
# Words that can stand next to a melanoma word without changing its meaning.
_MELANOMA_QUALIFIERS = frozenset({
    "a", "acral", "advanced", "alm", "amelanotic", "and", "arising", "associated", "balloon", "blue", "breslow", "cell",
    "cells", "childhood", "clark", "congenital", "cutaneous", "cutis", "depth", "desmoplastic", "dx", "early", "equal",
    "from", "hypomelanotic", "i", "ii", "iii", "in", "insitu", "intraepidermal", "invasive", "iv", "late", "lentiginous",
    "lentigo", "less", "level", "maligna", "malignant", "melanocytic", "metastases", "metastasis", "metastatic", "mm",
    "more", "mucosal", "naevoid", "naevus", "nail", "nevoid", "nevus", "nm", "nodular", "nos", "of", "on", "pagetoid",
    "pediatric", "pigmented", "plantar", "primary", "proliferation", "proliferations", "recurrent", "regressed",
    "regressing", "regression", "s", "satellite", "scalp", "situ", "skin", "spindle", "spitzoid", "spreading", "stage",
    "subungual", "superficial", "than", "the", "thick", "thickness", "thin", "to", "type", "ulcerated", "unspecified",
    "uveal", "v", "verrucous", "with", "within",
})  # fmt: skip

# Words that each name another diagnosis. Plurals and spellings are listed, and not derived from endings.
_OTHER_WORDS = frozenset({
    "abrasions", "abscess", "acanthoma", "acanthomas", "acanthosis", "ack", "acne", "acrochordon", "acrochordons",
    "acropustulosis", "actinic", "adenoma", "adnexal", "aimp", "ak", "akiec", "albinism", "alopecia", "amyloidosis",
    "anetoderma", "angiofibroma", "angiokeratoma", "angiokeratomas", "angioleiomyoma", "angioma", "angiomas", "aquagenic",
    "arteriovenous", "atypia", "bcc", "behcets", "bkl", "blastomycosis", "bowen", "bowens", "bullous", "burn",
    "calcinosis", "callus", "carcinoma", "carcinomas", "cellulitis", "chilblain", "chromoblastomycosis",
    "coccidioidomycosis", "collagenoma", "comedone", "cyst", "cysts", "dariers", "dermatitis", "dermatofibroma",
    "dermatofibromas", "dermatofibrosarcoma", "dermatomyositis", "dermatosis", "df", "drug", "eccrine", "ecthyma",
    "eczema", "ehlers", "ephelides", "ephelis", "epidermolysis", "epithelioma", "erythema", "erythrasma", "exanthem",
    "exogenous", "fibrokeratoma", "fibroma", "fibromas", "fibrous", "fissure", "follicle", "folliculitis", "fordyce",
    "foreign", "freckle", "freckles", "fungal", "fungoides", "furuncle", "furuncles", "genodermatoses", "graft",
    "granuloma", "granulomas", "haemangioma", "haemangiomas", "haematoma", "haemorrhage", "hailey", "halo", "hemangioma",
    "hemangiomas", "hematoma", "hemorrhage", "herpes", "hidradenitis", "hidradenoma", "hidrocystoma", "histiocytoma",
    "histiocytosis", "hyperkeratosis", "hyperpigmentation", "hyperplasia", "hypopigmentation", "ichthyosis", "impetigo",
    "inflammation", "inflammatory", "injuries", "insect", "intertrigo", "kaposi", "kaposis", "keloid", "keloids",
    "keratoacanthoma", "keratoacanthomas", "keratoses", "keratosis", "leiomyoma", "lentigines", "lentigo", "lentigos",
    "leukemia", "leukonychia", "lichen", "lichenoid", "lipoma", "lipomas", "livedo", "lplk", "lupus", "lymphangioma",
    "lymphocytic", "lymphoma", "lymphomas", "macule", "mastocytoma", "mastocytosis", "melanoacanthoma", "melanocytoma",
    "melanocytomas", "melanonychia", "melanosis", "melanotic", "melasma", "merkel", "milia", "milium", "molluscum",
    "morphea", "mucinosis", "mucocele", "mycosis", "myiasis", "naevi", "naevus", "necrobiosis", "nematode",
    "neurodermatitis", "neurofibroma", "neurofibromas", "neurofibromatosis", "neuroma", "neurotic", "neutrophilic", "nev",
    "nevi", "nevocytic", "nevus", "nevuses", "nv", "onychomycosis", "onychoschizia", "orthokeratosis", "papilloma",
    "papillomas", "papillomatosis", "papular", "papule", "parapsoriasis", "perleche", "perlèche", "photodermatosis",
    "phototoxic", "pilar", "pilaris", "pilomatricoma", "pinguecula", "pityriasis", "poikiloderma", "porokeratosis",
    "poroma", "poromas", "porphyria", "proliferation", "proliferations", "prurigo", "psoriasis", "purpura", "pustular",
    "pustulosis", "pyoderma", "pyogenic", "reaction", "rhinophyma", "rosacea", "sarcoidosis", "sarcoma", "sarcomas",
    "scabies", "scar", "scars", "scc", "scleroderma", "sebaceous", "sebopsoriasis", "seborrhea", "sek", "spitz", "stasis",
    "steatocystoma", "stevens", "striae", "stucco", "subcorneal", "sunburn", "syphilis", "syringoma", "syringomas", "tag",
    "tags", "telangiectases", "telangiectasia", "tick", "tinea", "trichilemmoma", "trichoblastoma", "trichoepithelioma",
    "trichofolliculoma", "ulcer", "ulcerations", "urticaria", "vasc", "vascular", "vasculitis", "verruca", "verrucae",
    "verrucas", "vitiligo", "wart", "warts", "xanthelasma", "xanthogranuloma", "xanthoma", "xanthomas", "xerosis",
})  # fmt: skip
# Classes that mean "not melanoma" although they name no diagnosis.
_OTHER_TERMS = frozenset({
    "benign", "other", "others", "non neoplastic", "nonneoplastic", "normal", "healthy", "normal skin", "healthy skin",
    "misc", "miscellaneous", "non malignant", "nonmalignant", "not malignant", "no cancer", "mole", "moles",
})  # fmt: skip
_PROLIFERATION = frozenset({"proliferation", "proliferations"})
# "Malignant proliferation" can be a melanoma, unless its tissue excludes that.
_TISSUES = frozenset(
    {"epidermal", "adnexal", "follicular", "dermal", "soft", "lymphocytic", "vascular", "neural", "mesenchymal"}
)
_MALIGNANT_TISSUES = frozenset({"malignant epidermal", "malignant dermal"})  # two of the nine groups of Fitzpatrick17k
_NEGATED_MELANOMA = re.compile(
    r"\b(?:(?:no|non|not|without|negative for|absence of|other than|excluding|free of)\s+(?:a\s+|any\s+)?(?:malignant\s+)?"
    r"(?:melanomas?|mel)|(?:nonmelanomas?|nomelanoma|notmelanoma|nonmel))\b"
)
_UNCERTAIN = re.compile(
    r"\?|\b(?:vs|versus|or|suspect(?:ed)?|suspicious|suspicion|possible|possibly|probable|probably|likely|rule|"
    r"ruled|r o|ro|differential|ddx|dd|history|hx|consistent|cannot|excluded?|simulator|mimic|like|maybe|favou?r)\b"
)
_NEGATION = re.compile(r"\b(?:no|non|not|without|negative|absence|free|never)\b")


def plain_words(value: str) -> str:
    """A value in lower case, its words (letters, digits, decimal points, ?) separated by single spaces."""
    text = (
        unicodedata.normalize("NFKC", value).casefold().replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    )
    return " ".join(re.findall(r"\d+\.\d+|[^\W_]+|\?", text))


def is_yes(value: str) -> bool:
    return value.strip().casefold() in _YES


def is_no(value: str) -> bool:
    return value.strip().casefold() in _NO


def binary_class(value: str) -> BinaryClass | None:
    """Class of a diagnosis.

    Returns:
        "malignant" for melanoma (or the word "malignant" alone), "benign" for another diagnosis (or the word "benign" alone),
        "" for a missing diagnosis, and None for a value that is not understood: unknown words, a doubtful diagnosis ("melanoma
        vs nevus"), or a negation of something else.
    """
    words = plain_words(value)
    if not words or words in _NO_DIAGNOSIS:
        return ""
    if words == MALIGNANT or words in _MELANOMA_TERMS:
        return MALIGNANT
    if words in _OTHER_TERMS:
        return BENIGN
    rest, negated = _NEGATED_MELANOMA.subn(" ", words)
    tokens = rest.split()
    if "lentigo maligna" in rest or any(token in _MELANOMA_WORDS for token in tokens):
        if negated or _UNCERTAIN.search(rest) or _NEGATION.search(rest):
            return None
        known = _MELANOMA_WORDS | _MELANOMA_QUALIFIERS
        return MALIGNANT if all(token in known or re.fullmatch(r"[\d.]+[a-d]?", token) for token in tokens) else None
    if any(_resembles_melanoma(token) for token in tokens):
        return None
    if negated:
        neutral = {
            "skin",
            "cancer",
            "cancers",
            "lesion",
            "lesions",
            "tumor",
            "tumour",
            "benign",
            "other",
            "class",
            "diagnosis",
        }
        tokens = [token for token in tokens if token not in neutral]
        if not tokens:
            return BENIGN
    # "or" between two other diagnoses, as in "Nevus, Atypical, Dysplastic, or Clark" of the Archive, is not a doubt.
    if _NEGATION.search(rest) or _UNCERTAIN.search(re.sub(r"\bor\b", " ", rest)):
        return None
    if "benign" in tokens:
        return None if "malignant" in tokens else BENIGN
    if "malignant" in tokens and (
        "melanocytic" in tokens or not set(tokens) & (_OTHER_WORDS - _PROLIFERATION | _TISSUES)
    ):
        return None
    return BENIGN if any(token in _OTHER_WORDS for token in tokens) or words in _MALIGNANT_TISSUES else None


def is_melanoma(class_name: str) -> bool:
    """Whether the name of a class means melanoma. As in the `target` of ISIC, 1 does and 0 does not.

    False for a name that is not understood; use `binary_class` where this would decide a label.
    """
    return is_yes(class_name) or binary_class(class_name) == MALIGNANT


def _resembles_melanoma(word: str) -> bool:
    """Whether a word can be melanoma in another spelling or language ("melanom", "melenoma", "melanome")."""
    if word in _OTHER_WORDS or word in {"melanocytic", "melanocyte", "melanocytes", "melanin"}:
        return False
    return word.startswith(("melanom", "mélanom")) or _distance_at_most_two(word, "melanoma")


def _distance_at_most_two(a: str, b: str) -> bool:
    """Whether the edit distance of two words is at most 2."""
    if abs(len(a) - len(b)) > 2:
        return False
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1] <= 2
