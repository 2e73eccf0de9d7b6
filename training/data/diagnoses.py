"""Decide whether a diagnosis or class name means melanoma, by an explicit vocabulary and without a default class.

`binary_class` knows the terms of the ISIC challenges and the ISIC Archive, HAM10000, PAD-UFES-20, DDI, BCN20000, derm7pt and
Fitzpatrick17k. For other terms it returns None, and the caller asks the user to map them. `other_malignancy` tells which of the
diagnoses that are not melanoma are another cancer, or may become one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
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
_MELANOMA_TERMS = frozenset({
    "alm", "lentigo maligna", "melanoma in situ acral or acral lentiginous", "melanoma in situ recurrent or persistent",
    "melanoma invasive acral or acral lentiginous", "melanoma invasive blue nevus like",
    "melanoma invasive heavily pigmented resembling epithelioid blue nevus or melanoma developing in animals",
    "melanoma invasive on chronically sun exposed skin or lentigo maligna melanoma",
    "melanoma invasive pigmented spindle cell nevus like", "melanoma invasive recurrent or persistent",
    "melanoma invasive resembling blue nevus", "nm",
})  # fmt: skip
# Words that can stand next to a melanoma word without changing its meaning.
_MELANOMA_QUALIFIERS = frozenset({
    "a", "acral", "advanced", "alm", "amelanotic", "and", "arising", "associated", "balloon", "blue", "breslow", "cell",
    "cells", "childhood", "clark", "congenital", "cutaneous", "cutis", "depth", "desmoplastic", "dx", "early", "equal",
    "from", "heavily", "hypomelanotic", "i", "ii", "iii", "in", "insitu", "intraepidermal", "invasive", "iv", "late",
    "lentiginous", "lentigo", "less", "level", "maligna", "malignant", "melanocytic", "metastases", "metastasis",
    "metastatic", "mm", "more", "mucosal", "naevoid", "naevus", "nail", "neurotropic", "nevoid", "nevus", "nm",
    "nodular", "nos", "of", "on", "originating", "pagetoid", "pediatric", "pigmented", "plantar", "primary",
    "proliferation", "proliferations", "recurrent", "regressed", "regressing", "regression", "s", "satellite", "scalp",
    "situ", "skin", "spindle", "spitzoid", "spreading", "stage", "subungual", "superficial", "than", "the", "thick",
    "thickness", "thin", "to", "type", "ulcerated", "unspecified", "uveal", "v", "verrucous", "with", "within",
})  # fmt: skip

# Words that each name another diagnosis. Plurals and spellings are listed, and not derived from endings.
_OTHER_WORDS = frozenset({
    "abrasions", "abscess", "acanthoma", "acanthomas", "acanthosis", "ack", "acne", "acroangiodermatitis",
    "acrochordon", "acrochordons", "acrodermatitis", "acropustulosis", "actinic", "adenoma", "adnexal", "aimp", "ak",
    "akiec", "albinism", "alopecia", "amyloidosis", "anetoderma", "angiofibroma", "angiokeratoma", "angiokeratomas",
    "angioleiomyoma", "angiolipoma", "angioma", "angiomas", "angiosarcoma", "aquagenic", "arteriovenous", "atypia",
    "bcc", "behcets", "bkl", "blastomycosis", "bowen", "bowenoid", "bowens", "bullous", "burn", "calcinosis", "callus",
    "carcinoma", "carcinomas", "cellulitis", "cheilitis", "chilblain", "chondroma", "chromoblastomycosis",
    "coccidioidomycosis", "collagenoma", "comedo", "comedone", "condyloma", "condylomas", "condylomata", "cylindoma",
    "cylindroma", "cyst", "cystadenoma", "cysts", "dariers", "dermatitis", "dermatofibroma", "dermatofibromas",
    "dermatofibrosarcoma", "dermatomyofibroma", "dermatomyositis", "dermatosis", "df", "drug", "dyskeratoma", "eccrine",
    "ecthyma", "eczema", "ehlers", "ephelides", "ephelis", "epidermolysis", "epithelioma", "erdheim", "erythema",
    "erythrasma", "exanthem", "exogenous", "fasciitis", "fibroadenoma", "fibrofolliculoma", "fibrokeratoma",
    "fibrolipoma", "fibroma", "fibromas", "fibrosarcoma", "fibrous", "fibroxanthoma", "fissure", "follicle",
    "folliculitis", "fordyce", "foreign", "freckle", "freckles", "fungal", "fungoides", "furuncle", "furuncles",
    "genodermatoses", "glomangioma", "glomangiomas", "glomangiomyoma", "graft", "granuloma", "granulomas",
    "haemangioma", "haemangiomas", "haematoma", "haemorrhage", "hailey", "halo", "hamartoma", "hemangioendothelioma",
    "hemangioma", "hemangiomas", "hematoma", "hemorhage", "hemorrhage", "hemorrhagic", "herpes", "hidradenitis",
    "hidradenocarcinoma", "hidradenoma", "hidrocystoma", "histiocytoma", "histiocytosis", "hyperkeratosis",
    "hyperpigmentation", "hyperplasia", "hypopigmentation", "ichthyosis", "impetigo", "inflammation", "inflammatory",
    "infundibular", "infundibulum", "injuries", "insect", "intertrigo", "kaposi", "kaposis", "keloid", "keloids",
    "keratoacanthoma", "keratoacanthomas", "keratoses", "keratosis", "leiomyoma", "leiomyosarcoma", "lentigines",
    "lentigo", "lentigos", "leukemia", "leukonychia", "lichen", "lichenoid", "lipoma", "lipomas", "liposarcoma",
    "livedo", "lplk", "lupus", "lyme", "lymphangioma", "lymphocytic", "lymphoma", "lymphomas", "lymphomatoid",
    "lymphoproliferative", "macule", "malformation", "mastocytoma", "mastocytosis", "melanoacanthoma", "melanocytoma",
    "melanocytomas", "melanocytosis", "melanonychia", "melanosis", "melanotic", "melasma", "merkel", "milia", "milium",
    "molluscum", "mongolian", "morphea", "mucinosis", "mucocele", "mycosis", "myiasis", "myoepithelioma", "myxoma",
    "naevi", "naevus", "necrobiosis", "nematode", "neurodermatitis", "neurofibroma", "neurofibromas",
    "neurofibromatosis", "neuroma", "neurothekeoma", "neurotic", "neutrophilic", "nev", "nevi", "nevocytic", "nevus",
    "nevuses", "nv", "onychomycosis", "onychoschizia", "orthokeratosis", "osteochodroma", "osteochondroma", "osteoma",
    "osteosarcoma", "paget", "pagets", "panfolliculoma", "papilloma", "papillomas", "papillomatosis", "papilomatosis",
    "papular", "papule", "parapsoriasis", "paronychia", "pediculosis", "perineurioma", "perleche", "perlèche",
    "photodermatoses", "photodermatosis", "phototoxic", "pilar", "pilaris", "piloleiomyoma", "pilomatricoma",
    "pinguecula", "pityriasis", "poikiloderma", "polyp", "polyps", "porocarcinoma", "porokeratosis", "poroma",
    "poromas", "porphyria", "proliferation", "proliferations", "prurigo", "psoriasis", "purpura", "pustular",
    "pustulosis", "pyoderma", "pyogenic", "reaction", "reticulohistiocytosis", "rhabdomyosarcoma", "rhabdomyoscaroma",
    "rhinophyma", "rosacea", "rosai", "sarcoidosis", "sarcoma", "sarcomas", "scabies", "scar", "scars", "scc",
    "schwannoma", "scleroderma", "scleromyxedema", "sebaceoma", "sebaceous", "sebopsoriasis", "seborrhea", "sek",
    "sezary", "spiradenoma", "spitz", "stasis", "steatocystoma", "stevens", "striae", "stucco", "subcorneal", "sunburn",
    "syphilis", "syringocystadenoma", "syringofibroadenoma", "syringoma", "syringomas", "tag", "tags", "tattoo",
    "telangiectases", "telangiectasia", "tick", "tinea", "tragus", "trichilemmoma", "trichoblastoma", "trichodiscoma",
    "trichoepithelioma", "trichofolliculoma", "tricholemmal", "tricholemmoma", "tungiasis", "ulcer", "ulcerations",
    "urticaria", "vasc", "vascular", "vasculitis", "verruca", "verrucae", "verrucas", "vitiligo", "wart", "warts",
    "xanthelasma", "xanthogranuloma", "xanthoma", "xanthomas", "xerosis",
})  # fmt: skip
# Diagnoses other than melanoma whose words alone would be too general, or a doubt.
_OTHER_PHRASES = frozenset({
    "aplasia cutis", "atypical intradermal smooth muscle tumor", "atypical melanocytic neoplasm",
    "atypical melanocytic neoplasms", "atypical pigmented spindle cell tumor",
    "blastic plasmacytoid dendritic cell neoplasm", "chronic active ebv infection", "dilated pore",
    "epidermal keratinous", "fixed eruption", "fixed eruptions", "giant cell tumor of the tendon sheath",
    "glomus tumor", "granular cell tumor", "granular cell tumor neural and s100 positive",
    "granular cell tumor non neural and s100 negative", "incontinentia pigmenti", "malignant glomus tumor",
    "malignant granular cell tumor", "malignant mixed tumor", "malignant peripheral nerve sheath tumor",
    "melanocytic tumor of uncertain malignant potential", "melanocytic tumour of uncertain malignant potential",
    "mixed tumor", "mixed tumor apocrine type", "port wine stain", "port wine stains",
    "skin metastasis of internal solid cancer non hematological", "sun damaged skin", "supernumerary nipple",
    "tuberous sclerosis", "venous lake", "xeroderma pigmentosum",
})  # fmt: skip
# Parts of names of diagnoses that look like a doubt or a negation.
_NOT_DOUBTS = re.compile(
    r"\b(?:(?<=\bgraft )(?:vs|versus)(?= host\b)|(?<=\bmelanotic pigmentations )not melanocytic nevus|without atypia"
    r"|(?<=\bcongenital )by history(?: and histopathological pattern)?|(?<=\blichen planus )like(?= keratosis\b)"
    r"|(?<=\bpanniculitis )like|non(?= langerhans\b))\b"
)
# Cancers other than melanoma, in situ or invasive, as all of these collections count them.
_CANCER_WORDS = frozenset({
    "angiosarcoma", "bcc", "bowen", "bowens", "carcinoma", "carcinomas", "dermatofibrosarcoma",
    "fibrosarcoma", "fungoides", "hemangioendothelioma", "hidradenocarcinoma", "kaposi", "kaposis", "leiomyosarcoma",
    "leukemia", "liposarcoma", "lymphoma", "lymphomas", "lymphomatoid", "lymphoproliferative", "merkel", "osteosarcoma",
    "paget", "pagets", "porocarcinoma", "rhabdomyosarcoma", "rhabdomyoscaroma", "sarcoma", "sarcomas", "scc", "sezary",
})  # fmt: skip
_CANCER_PHRASES = (
    "atypical intradermal smooth muscle tumor", "blastic plasmacytoid dendritic cell neoplasm", "chronic active ebv infection",
    "malignant adnexal", "malignant dermal", "malignant epidermal", "malignant soft tissue",
    "skin metastasis of internal solid cancer",
)  # fmt: skip
# Precursors of squamous cell carcinoma, and lesions whose behaviour is uncertain. Collections disagree on actinic keratosis:
# malignant in Fitzpatrick17k, benign in DDI, indeterminate in the ISIC Archive.
_PRECANCER_WORDS = frozenset({
    "ack", "aimp", "ak", "akiec", "bowenoid", "fibroxanthoma", "keratoacanthoma", "keratoacanthomas",
})  # fmt: skip
_PRECANCER_PHRASES = re.compile(
    r"\b(?:(?:actinic|solar) (?:keratos[ei]s|cheilitis)|uncertain malignant potential"
    r"|indeterminate (?:epidermal|melanocytic) proliferations?|atypical pigmented spindle cell tumou?r"
    r"|atypical (?:intraepithelial )?melanocytic (?:neoplasm|proliferation|tumou?r)s?)\b"
)
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
    """Class of a diagnosis, or of its levels from general to specific with "::" between them.

    Returns:
        "malignant" for melanoma (or the word "malignant" alone), "benign" for another diagnosis (or the word "benign" alone),
        "" for a missing diagnosis, and None for a value that is not understood: unknown words, a doubtful diagnosis ("melanoma
        vs nevus"), or a negation of something else.
    """
    if "::" in value:
        return _class_of_levels(value.split("::"))
    words = plain_words(value)
    if not words or words in _NO_DIAGNOSIS:
        return ""
    if words == MALIGNANT or words in _MELANOMA_TERMS:
        return MALIGNANT
    if words in _OTHER_TERMS or words in _OTHER_PHRASES:
        return BENIGN
    rest, negated = _NEGATED_MELANOMA.subn(" ", _NOT_DOUBTS.sub(" ", words))
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


def _class_of_levels(levels: Sequence[str]) -> BinaryClass | None:
    """Class of a diagnosis by its levels. The most general one, "Malignant", can be any cancer."""
    classes = {level: "" if plain_words(level) == MALIGNANT else binary_class(level) for level in levels}
    if MALIGNANT in classes.values():
        return MALIGNANT
    doubtful = [level for level, class_name in classes.items() if class_name is None]
    if BENIGN in classes.values() and not any("mel" in level.casefold() for level in doubtful):
        return BENIGN
    return None if doubtful else ""


def other_malignancy(value: str) -> Literal["cancer", "precancer", ""]:
    """Whether a diagnosis that is not melanoma is a cancer.

    Args:
        value: A diagnosis, or its levels from general to specific as one text.

    Returns:
        "cancer" for another cancer, in situ or invasive; "precancer" for a lesion that may become one, or whose behaviour is
        uncertain; otherwise "".
    """
    words = plain_words(value)
    if binary_class(value) == MALIGNANT:
        return ""
    tokens = set(words.split())
    if tokens & _CANCER_WORDS or words.startswith("malignant ") or any(phrase in words for phrase in _CANCER_PHRASES):
        return "cancer"
    return "precancer" if tokens & _PRECANCER_WORDS or _PRECANCER_PHRASES.search(words) else ""


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
