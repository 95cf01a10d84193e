import ArgumentParser

extension ArgumentHelp {
    /// The help of an option whose text is read by a function of ours: ArgumentParser shows the default of others only.
    init(_ text: String, default value: some CustomStringConvertible, valueName: String? = nil) {
        self.init("\(text) (default: \(value))", valueName: valueName)
    }
}
