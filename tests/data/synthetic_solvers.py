"""Each task solved from its text alone, by plain Python: {position: answer symbol}. Written apart from the draws."""


def needle(words, both_ways):
    values = [(i, w) for i, w in enumerate(words) if w[0] == "v"]
    answers = {}
    for i, word in enumerate(words):
        if word != "?":
            continue
        if any(w[0] == "k" for w in words):
            found = [w for j, w in values if words[j - 1] == words[i + 1] and words[j - 2 : j - 1] != ["?"]]
            place = i + 1
        else:
            found, place = [w for _, w in values], i
        (answers[place],) = found
    return answers


def copy(words, both_ways, order="same"):
    bar = words.index("|")
    letters = [w for w in words[:bar] if w != "."]
    said = letters if order == "same" else letters[::-1]
    first = bar + 1 if both_ways else bar
    return dict(enumerate(said, first))


def recall(words, both_ways):
    known, answers, i = {}, {}, 0
    while i < len(words):
        if words[i][0] == "k" and i + 1 < len(words) and words[i + 1][0] == "v":
            known[words[i]] = words[i + 1]
            i += 1
        elif words[i][0] == "k":
            answers[i] = known[words[i]]
        i += 1
    return answers


def two_step(words, both_ways):
    known, answers = {}, {}
    for i, word in enumerate(words):
        if word[0] == "v":
            known[words[i - 1][1:]] = word
        elif word[0] == "q":
            answers[i] = known[word[1:]]
    return answers


def state(words, both_ways, states=4):
    now, answers = None, {}
    for i, word in enumerate(words):
        if word[0] == "=":
            now = int(word[1:])
        elif now is not None:
            now = (now + int(word)) % states
        if now is not None:
            answers[i] = f"={now}"
    return answers


def furthest(words, both_ways, points=64):
    numbers = [int(w[1:]) for w in words]
    answers = {}
    for i, own in enumerate(numbers):
        seen = set(numbers if both_ways else numbers[: i + 1])
        far = {p: min((p - own) % points, (own - p) % points) for p in seen}
        best = [p for p in seen if far[p] == max(far.values())]
        answers[i] = f"p{min(best, key=lambda p: (p - own) % points)}"
    return answers


def programs(words, both_ways, largest=10):
    holds, answers, place = {}, {}, 0
    while place < len(words) and words[place] != ".":
        end = words.index(";", place)
        statement = words[place:end]
        runs = True
        if statement[0] == "if":
            value, number = holds[statement[1]], int(statement[3])
            runs = value < number if statement[2] == "<" else value > number
            assert statement[4] == ":"
            statement = statement[5:]
        if statement[0] == "print":
            if runs:
                answers[end] = str(holds[statement[1]])
        elif statement[1] == "=":
            assert statement[0] not in holds  # assigned once
            holds[statement[0]] = int(statement[2])
        elif runs:
            step = 1 if statement[1] == "++" else -1
            holds[statement[0]] = min(max(holds[statement[0]] + step, 1), largest)
        place = end + 1
    assert set(words[place:]) <= {"."}
    return answers
