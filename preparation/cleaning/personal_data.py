"""Masking of e-mail addresses, IP addresses and phone numbers."""

import ipaddress
import re

# Each look-behind comes after the first character: `re` searches four times as fast for a pattern that begins with one.
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?!\d+x\.)(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)  # not icon@2x.png
IPV4 = re.compile(r"[0-9](?<![\w.].)(?<![A-Za-z]-.)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\w|-[A-Za-z])")
IPV6 = re.compile(  # 2000::/3, the only part of the space that is in public use
    r"[23](?<![\w:.].)[0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}(?:[0-9A-Fa-f]{1,4}|(?<=::))(?!\w|:\w)"
)
VERSION_WORD = re.compile(
    r"(?:\b(?:versions?|ver|v|rev(?:ision)?|releases?d?|firmware|driver|build|sections?|chapters?)|§)[ \t.:=#\"'(]*\Z",
    re.IGNORECASE,
)
# E.164 allows 15 digits after the plus sign; with fewer than 8 it may be any number.
INTERNATIONAL_PHONE = re.compile(r"\+(?<![\w.+].)[1-9](?:[ ./()-]{0,2}\d){7,14}(?!\w|[.,-]\d)")
# The North American plan: area code and exchange begin with 2 to 9. With (), after "1-", or separated by - or .
US_PHONE = re.compile(
    r"[(1-9](?<![\w.+/-].)(?:(?<=\()[2-9]\d\d\)[ -]?|(?<=1)[ .-]\(?[2-9]\d\d\)?[ .-]|(?<=[2-9])\d\d[.-])"
    r"[2-9]\d\d[ .-]\d{4}(?!\w|[.-]\d)"
)


def mask_personal_data(text: str) -> str:
    """E-mail addresses, public IP addresses and phone numbers become <EMAIL>, <IP_ADDRESS> and <PHONE_NUMBER>.

    Private, loopback, multicast and documentation addresses stay, as in FineWeb (arXiv 2406.17557). Four numbers that
    look like a version or a section stay too: after such a word, within a name ("foo-1.2.3.45"), or if three of them
    have one digit ("2.6.19.2", the form of one address in 4,300). Phone numbers are masked if they are international
    ones with a plus sign or North American ones; others look like any number. Names of people are not masked.
    """
    masked = _mask_once(text)
    if masked == text:
        return text
    lines = masked.split("\n")
    for i, before in enumerate(text.split("\n")):  # no pattern crosses a line end
        while lines[i] != before:  # after a replacement, a number next to it may match
            before, lines[i] = lines[i], _mask_once(lines[i])
    return "\n".join(lines)


def _mask_once(text: str) -> str:
    if "@" in text:
        text = EMAIL.sub("<EMAIL>", text)
    text = IPV4.sub(_mask_address, text)
    if ":" in text:
        text = IPV6.sub(_mask_address, text)
    if "+" in text:
        text = INTERNATIONAL_PHONE.sub(_mask_phone, text)
    return US_PHONE.sub("<PHONE_NUMBER>", text)


def _mask_address(match: re.Match[str]) -> str:
    found, before = match[0], match.string[max(0, match.start() - 16) : match.start()]
    single_digits = sum(len(part) == 1 for part in found.split("."))  # 0 in IPv6
    if single_digits >= 3 or VERSION_WORD.search(before):
        return found
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return found
    return "<IP_ADDRESS>" if address.is_global and not address.is_multicast else found


def _mask_phone(match: re.Match[str]) -> str:
    groups = re.findall(r"\d+", match[0])
    if len(groups) == 1:  # "+12345678" is usually just a number
        is_phone = len(groups[0]) >= 10
    else:  # one point is a decimal point; after the area code no group has a single digit
        is_phone = not (len(groups) == 2 and "." in match[0]) and all(len(group) > 1 for group in groups[2:])
    return "<PHONE_NUMBER>" if is_phone else match[0]
