"""Short texts of different kinds, on which a tokenizer is compared with others (`tokenizer_evaluation.py`).

Written for this project. They stay as they are: a changed letter changes every figure reported so far.
"""

NEWS = """\
The harbour council voted on Tuesday evening to close the old ferry terminal for two winters, ending a dispute that has
divided the town since the storm of 2019. Engineers told the meeting that salt water had eaten through 14 of the 60
wooden piles, and that repairs would cost at least $8.3 million. "We can patch it again, or we can build it once and
build it well," said Marit Olesen, who chairs the council's transport committee. "Nobody here wants to pay for the same
pier three times."

Shopkeepers along Quay Street fear for their trade. About 900 passengers a day walk past their windows in summer, and
the temporary landing will be nearly two miles away. The council has promised a free shuttle bus every twenty minutes
and a 40 percent cut in rates until the new terminal opens, which is planned for the spring after next.
"""

KOREAN = """\
지난 토요일 아침, 우리 동네 도서관이 일 년 만에 다시 문을 열었다. 새 건물은 예전보다 두 배
넓고, 창문이 커서 낮에는 불을 켜지 않아도 책을 읽을 수 있다. 아이들은 1층에서 그림책을
고르고, 어른들은 2층의 조용한 방에서 신문을 넘긴다. 사서 김은영 씨는 “책보다 사람이 먼저
모이는 곳을 만들고 싶었습니다”라고 말했다. 저녁 아홉 시까지 누구나 무료로 들어갈 수 있으며,
회원증을 만들면 한 번에 책을 일곱 권까지 빌릴 수 있다.
"""

CODE = '''\
class RingBuffer:
    """Keeps the last `capacity` items; old ones are overwritten."""

    def __init__(self, capacity: int):
        if capacity <= 0:
            raise ValueError(f"capacity must be positive, got {capacity}")
        self._items = [None] * capacity
        self._next, self._size = 0, 0

    def push(self, item) -> None:
        self._items[self._next] = item
        self._next = (self._next + 1) % len(self._items)
        self._size = min(self._size + 1, len(self._items))

    def __iter__(self):
        start = (self._next - self._size) % len(self._items)
        for offset in range(self._size):
            yield self._items[(start + offset) % len(self._items)]


for (let i = 0; i < rows.length; i++) {
    const { id, total = 0 } = rows[i];
    if (!seen.has(id) && total >= LIMIT) { seen.add(id); console.log(`${id}: ${total.toFixed(2)}`); }
}
'''

MATH = r"""\begin{theorem}
Let $a_1, \dots, a_n$ be positive real numbers with $\sum_{i=1}^{n} a_i = 1$. Then
\[
  \sum_{i=1}^{n} \frac{1}{a_i} \;\geq\; n^2 ,
\]
with equality if and only if $a_1 = a_2 = \dots = a_n = \frac{1}{n}$.
\end{theorem}
\begin{proof}
By the Cauchy--Schwarz inequality,
\begin{align*}
  n^2 = \Bigl( \sum_{i=1}^{n} \sqrt{a_i} \cdot \tfrac{1}{\sqrt{a_i}} \Bigr)^2
      \leq \Bigl( \sum_{i=1}^{n} a_i \Bigr) \Bigl( \sum_{i=1}^{n} \frac{1}{a_i} \Bigr)
      = \sum_{i=1}^{n} \frac{1}{a_i} .
\end{align*}
Equality holds when the vectors $(\sqrt{a_i})$ and $(1/\sqrt{a_i})$ are proportional, that is, when all $a_i$ agree.
\end{proof}
For example, $n = 3$ and $(a_1, a_2, a_3) = (0.5, 0.3, 0.2)$ gives $2 + 3.333\ldots + 5 = 10.333\ldots > 9$.
"""

SCIENCE = """\
Lichens are not single organisms but partnerships: a fungus gives the body its shape and shelter, while algae or
cyanobacteria living between its threads turn sunlight into sugar. Because they have no roots and no waxy skin, lichens
take up water, minerals and pollutants directly from the air. Their growth is slow, often less than a millimetre a year,
yet some colonies in the Arctic are thought to be more than four thousand years old. Biologists use the spread of
sensitive species to map sulphur dioxide and nitrogen compounds in cities, since photosynthesis in the algal cells fails
long before other plants show damage. When a lichen dries out, its metabolism almost stops; a few minutes after rain it
respires again as if nothing had happened.
"""

NUMBERS = """\
2021-03-14 09:26:53  1.732051  -40.5  6.022e23  0x1F4B  192.168.0.254  +44 20 7946 0958
Q1 12,480  Q2 13,975  Q3 9,310  Q4 15,002  total 50,767 (+8.64% on 46,729)
3 + 4 * 12 - 7 / 2 = 47.5; 2^16 = 65536; 1/7 = 0.142857142857; 17 * 23 = 391; 100000 - 99999 = 1
pi = 3.14159265358979323846, e = 2.71828182845904523536, isbn 978-0-306-40615-7, order 00048213
"""

UNICODE = """\
Größe, façade, mañana, žluťoučký kůň, İstanbul, smørrebrød: “quoted” — and then… Ελληνικά και Кириллица.
日本語の文と中文的句子，हिन्दी में एक वाक्य, שלום לכולם, مرحبا بالعالم, สวัสดีชาวโลก.
Signs: ∀x ∈ ℝ: x² ≥ 0, ½ ± ¾, 25 °C, €19.99, ½π ≈ 1.57, naïve ⇒ naı̈ve, ﬁ ligature, 👩🏽‍🚀🚀🌍🎉 ♞ → ♘
"""

SAMPLE_TEXTS = {
    "news": NEWS,
    "korean": KOREAN,
    "code": CODE,
    "math": MATH,
    "science": SCIENCE,
    "numbers": NUMBERS,
    "unicode": UNICODE,
}
