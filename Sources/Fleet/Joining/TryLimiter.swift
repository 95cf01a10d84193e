/// How often somebody may try a token: a few times at once, then once in a while. Addresses are counted apart, so that one that tries for ever
/// keeps no other one out.
public struct TryLimiter: Sendable {
    private struct Account {
        var left: Int
        var since: ContinuousClock.Instant
    }

    private let burst: Int
    private let pause: Duration
    private let capacity: Int
    private var accounts: [String: Account] = [:]

    /// Makes a limiter.
    ///
    /// - Parameters:
    ///   - burst: how many tries are free.
    ///   - pause: how long it takes until there is another one.
    ///   - capacity: how many addresses are told apart; what comes from more shares one account.
    public init(burst: Int = 5, pause: Duration = .seconds(2), capacity: Int = 256) {
        self.burst = burst
        self.pause = pause
        self.capacity = capacity
    }

    /// Whether an address may try now; it is counted if so.
    public mutating func admits(_ address: String, at now: ContinuousClock.Instant) -> Bool {
        if accounts[address] == nil, accounts.count >= capacity {
            let (burst, pause) = (burst, pause)
            accounts = accounts.filter { burst - $0.value.left > Int((now - $0.value.since) / pause) }
        }
        let name = accounts[address] == nil && accounts.count >= capacity ? "" : address
        var account = accounts[name] ?? Account(left: burst, since: now)
        let earned = Int((now - account.since) / pause)
        if earned > 0 {
            account.left = min(burst, account.left + earned)
            account.since += pause * earned
        }
        guard account.left > 0 else { return false }
        account.left -= 1
        accounts[name] = account
        return true
    }
}
