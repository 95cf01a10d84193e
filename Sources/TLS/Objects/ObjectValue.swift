internal import FoundationEssentials
internal import IO

/// The value of an object's property.
public enum ObjectValue: Sendable, Equatable {
    /// A text; in the keyval form everything is one.
    case text(String)
    /// A JSON boolean.
    case flag(Bool)
    /// A JSON number without a fraction.
    case number(Int)
    /// Values in their order.
    case list([ObjectValue])
    /// Values by name.
    case record([String: ObjectValue])

    /// A value of the keyval form.
    init(_ value: KeyValue.Value) {
        switch value {
        case .text(let text): self = .text(text)
        case .list(let items): self = .list(items.map(ObjectValue.init))
        case .record(let members): self = .record(members.mapValues(ObjectValue.init))
        }
    }
}

extension ObjectValue: Decodable {
    /// Reads a JSON value; null and fractions are errors.
    public init(from decoder: any Decoder) throws {
        if let container = try? decoder.singleValueContainer() {
            if let flag = try? container.decode(Bool.self) {
                self = .flag(flag)
                return
            }
            if let number = try? container.decode(Int.self) {
                self = .number(number)
                return
            }
            if let text = try? container.decode(String.self) {
                self = .text(text)
                return
            }
            if let list = try? container.decode([ObjectValue].self) {
                self = .list(list)
                return
            }
        }
        self = .record(try decoder.singleValueContainer().decode([String: ObjectValue].self))
    }
}
