"""What clients saw, from the notes that they took themselves: the answers to the probe, and the acknowledgements of the database."""
import statistics

MILLISECOND = 1_000_000


class Answers:
    """The probe's log: each answer with its request's number, and when both happened."""

    def __init__(self, path):
        self.path, self.position = path, 0
        self.answers, self.late, self.seen, self.doubles = [], [], set(), 0

    def read(self):
        """Takes in what has been noted since; half a line is left for later."""
        with open(self.path) as file:
            file.seek(self.position)
            text = file.read()
        complete = text[: text.rfind("\n") + 1]
        self.position += len(complete)
        for line in complete.splitlines():
            first, *rest = line.split()
            times = [int(word) for word in rest]
            if first == "late":
                self.late.append(times)
            else:
                self._add(int(first), *times)
        return self

    def _add(self, number, sent, came):
        if number in self.seen:
            self.doubles += 1
        self.seen.add(number)
        self.answers.append((came, sent, number))

    def has_since(self, moment):
        """Whether a request that was made after a moment was answered."""
        return any(sent > moment for _, sent, _ in self.read().answers[-50:])

    def _between(self, begin, end):
        """The answers that came in between, with the last one before and the first one after."""
        inside = [index for index, one in enumerate(self.answers) if begin <= one[0] <= end]
        if not inside:
            return []
        return self.answers[max(0, inside[0] - 1) : inside[-1] + 2]

    def gap(self, begin, end):
        """The longest time without an answer, in milliseconds."""
        times = [one[0] for one in self._between(begin, end)]
        return max((after - before for before, after in zip(times, times[1:])), default=end - begin) / MILLISECOND

    def silence(self, begin, end):
        """The longest time in which no request got an answer, however late, in milliseconds: nobody was there to take them."""
        requests = sorted((number, sent) for _, sent, number in self.answers if begin <= sent <= end)
        pairs = zip(requests, requests[1:])
        return max((after[1] - before[1] for before, after in pairs if after[0] > before[0] + 1), default=0) / MILLISECOND

    def own_pause(self, begin, end):
        """The longest time for which the probe itself was kept waiting, in milliseconds: no fault of the guest's."""
        return max((done - due for due, done in self.late if begin <= done and due <= end), default=0) / MILLISECOND


class Ledger:
    """The log of the clients that remember their transactions."""

    def __init__(self, path):
        self.path = path
        self.begun, self.acknowledged, self.troubles = {}, {}, []

    def read(self):
        self.__init__(self.path)
        with open(self.path) as file:
            for line in file:
                word, client, rest = line.rstrip("\n").split(" ", 2)
                if word in ("failed", "lost"):
                    self.troubles.append((word, f"client {client}: {rest}"))
                    continue
                number, moment = map(int, rest.split())
                (self.begun if word == "begin" else self.acknowledged)[int(client), number] = moment
        return self

    def of(self, word):
        return [words for one, words in self.troubles if one == word]

    def longest(self, begin, end):
        """The longest transaction that was under way in that time, in milliseconds; none when there was no transaction."""
        spans = [(self.begun[key], done) for key, done in self.acknowledged.items()]
        return max((done - start for start, done in spans if start <= end and done >= begin), default=0) / MILLISECOND or None

    def compare(self, rows):
        """What the database has, next to what it has acknowledged; returns what is wrong, in words."""
        missing = sorted(set(self.acknowledged) - rows)
        unknown = sorted(rows - set(self.begun))
        wrong = [f"{len(missing)} acknowledged transactions are missing, the first is {missing[0]}"] if missing else []
        return wrong + ([f"{len(unknown)} rows were never sent, the first is {unknown[0]}"] if unknown else [])


def table(rows, columns):
    """Lines of a table: a row is a name and a value for each column; below each load its medians and its worst."""
    width = max(len(name) for name, *_ in rows) + 2
    yield " " * width + "".join(f"{one:>{len(one) + 3}}" for one in columns)
    for name, *values in rows:
        yield f"{name:{width}}" + "".join(f"{show(value):>{len(one) + 3}}" for one, value in zip(columns, values))


def show(value):
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 20 or value == int(value) else f"{value:.1f}"


def summary(name, rows, function=statistics.median):
    """A row that says one thing about each column of rows."""
    columns = ([value for value in column if value is not None] for column in list(zip(*rows))[1:])
    return (name, *(function(column) if column else None for column in columns))
