/// Which keys and buttons are down: for the viewer who presses them, and for the guest, which may have been told otherwise. A value.
///
/// QEMU forgets what was down when the guest moves, and then drops the release of a key that it has not seen pressed, while the guest goes on
/// repeating it.
struct HeldInput: Sendable {
    /// What tells a key from others: the code of its place, where that is said, since its symbol changes with Shift.
    private enum Key: Sendable, Hashable {
        case symbol(UInt32)
        case code(UInt32)
    }

    private struct Held: Sendable, Hashable {
        var key: Key
        var symbol: UInt32

        func message(isDown: Bool) -> RFBClientMessage {
            switch key {
            case .symbol: .key(isDown: isDown, symbol: symbol)
            case .code(let code): .extendedKey(isDown: isDown, symbol: symbol, code: code)
            }
        }

        /// Shift, Control, Meta, Alt, Super and Hyper of X11, and its level-three shift: held while others are pressed. Not so the locks, which
        /// another press undoes.
        var isModifier: Bool {
            (0xffe1...0xffee).contains(symbol) && ![0xffe5, 0xffe6].contains(symbol) || symbol == 0xfe03
        }
    }

    /// The most keys that are remembered.
    private static let mostKeys = 64

    /// In the order in which they were pressed.
    private var pressed: [Held] = []
    private var told: [Held] = []
    private var buttons: UInt8 = 0
    private var toldButtons: UInt8 = 0
    private var position: (x: UInt16, y: UInt16) = (0, 0)

    init() {}

    /// The viewer says something.
    mutating func press(_ message: RFBClientMessage) {
        if case .pointer(let buttons, let x, let y) = message { (self.buttons, position) = (buttons, (x, y)) }
        Self.note(message, in: &pressed)
    }

    /// The guest is told something.
    mutating func tell(_ message: RFBClientMessage) {
        if case .pointer(let buttons, _, _) = message { toldButtons = buttons }
        Self.note(message, in: &told)
    }

    private static func note(_ message: RFBClientMessage, in held: inout [Held]) {
        let (one, isDown): (Held, Bool)
        switch message {
        case .key(let down, let symbol): (one, isDown) = (Held(key: .symbol(symbol), symbol: symbol), down)
        case .extendedKey(let down, let symbol, let code):
            (one, isDown) = (Held(key: .code(code), symbol: symbol), down)
        default: return
        }
        let index = held.firstIndex { $0.key == one.key }
        if !isDown {
            if let index { held.remove(at: index) }
        } else if index == nil, held.count < mostKeys {
            held.append(one)
        }
    }

    private static func has(_ one: Held, in held: [Held]) -> Bool { held.contains { $0.key == one.key } }

    /// Lets go of all that is down in the guest. Returns what it is to be told.
    mutating func release() -> [RFBClientMessage] {
        var messages = told.reversed().map { $0.message(isDown: false) }
        if toldButtons != 0 { messages.append(.pointer(buttons: 0, x: position.x, y: position.y)) }
        (told, toldButtons) = ([], 0)
        return messages
    }

    /// The guest was started anew: it believes nothing to be down.
    mutating func forget() { (told, toldButtons) = ([], 0) }

    /// Makes another QEMU know what the guest believes to be down, lets go of that, and presses the modifiers that the viewer still holds. Returns
    /// what it is to be told.
    mutating func takeUp() -> [RFBClientMessage] {
        var messages: [RFBClientMessage] = []
        for held in told {
            messages.append(held.message(isDown: true))
            if !held.isModifier || !Self.has(held, in: pressed) { messages.append(held.message(isDown: false)) }
        }
        if toldButtons != 0 {
            messages.append(.pointer(buttons: toldButtons, x: position.x, y: position.y))
            messages.append(.pointer(buttons: 0, x: position.x, y: position.y))
        }
        for held in pressed where held.isModifier && !Self.has(held, in: told) {
            messages.append(held.message(isDown: true))
        }
        told = pressed.filter(\.isModifier)
        toldButtons = 0
        return messages
    }
}
