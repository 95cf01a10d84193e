/// What the way to the destination carries: the shortest time in which a request was answered, and the highest rate of late.
///
/// The shortest answer of these connections stands for the round trip: later ones also wait behind what is under way.
struct PathEstimate {
    /// Over how long a rate is taken at least.
    static let period = Duration.milliseconds(50)
    /// How many such periods count as late.
    static let periods = 20

    /// From which round trip on a line is long: what one connection may have under way is less than what it could carry.
    static let long = Duration.milliseconds(2)

    /// The shortest time in which a request was answered; nil when none was.
    private(set) var roundTrip: Duration?
    private var began: ContinuousClock.Instant?
    private var bytes = 0
    /// The rates of the last periods, in bytes per second, and which of them is the next to be replaced.
    private var rates = [Double](repeating: 0, count: PathEstimate.periods)
    private var next = 0
    private var highest = 0.0
    /// The rate of the last period, in bytes per second; nil before there was one.
    private(set) var latest: Double?

    /// Begins with nothing.
    init() {}

    /// How many periods what others have seen counts for: enough to see something better.
    private static let trust = 3

    /// Begins with what others have just seen of the same way.
    init(rate: Double, roundTrip: Duration) {
        self.roundTrip = roundTrip
        (rates[Self.trust], highest) = (rate, rate)
    }

    /// What the way holds: the bytes that are under way when it is just full. Zero as long as nothing is known.
    var product: Int {
        guard let roundTrip else { return 0 }
        return Int(clamping: Int64(highest * (roundTrip / .seconds(1))))
    }

    /// A request with so many bytes of payload, sent at a time, was answered.
    ///
    /// - Returns: whether that ended a period.
    @discardableResult
    mutating func answered(_ count: Int, sent: ContinuousClock.Instant, now: ContinuousClock.Instant) -> Bool {
        let time = now - sent
        if roundTrip.map({ time < $0 }) ?? true { roundTrip = time }
        bytes += count
        guard let began else {
            self.began = now
            bytes = 0
            return false
        }
        let passed = now - began
        guard passed >= max(Self.period, roundTrip ?? .zero) else { return false }
        let rate = Double(bytes) / (passed / .seconds(1))
        rates[next] = rate
        latest = rate
        next = (next + 1) % rates.count
        highest = rates.max() ?? 0
        bytes = 0
        self.began = now
        return true
    }

    /// New connections may take another way. What was seen of the rate stays.
    mutating func restart() {
        roundTrip = nil
        began = nil
        bytes = 0
    }
}
