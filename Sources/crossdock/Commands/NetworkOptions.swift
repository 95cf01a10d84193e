import ArgumentParser
import Emulator
import Source

/// Which bridges of the other host take the place of those here.
struct NetworkOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "A network of the guest, by the bridge or the tap that it has where it is, and the bridge of the other host that takes its "
                + "place: a tap is made in it, and removed with the guest. May be repeated.",
            valueName: "source=bridge"
        )
    )
    var network: [String] = []

    /// What was said, by the bridge or tap; nil for nothing.
    ///
    /// - Throws: `ValidationError`.
    func bridges() throws -> [String: String]? {
        var bridges: [String: String] = [:]
        for text in network {
            let parts = text.split(separator: "=", omittingEmptySubsequences: false).map(String.init)
            guard parts.count == 2, parts.allSatisfy({ !$0.isEmpty && $0.utf8.count < 16 }),
                PeerText.isInterface(parts[1])
            else {
                throw ValidationError(
                    "--network takes SOURCE=BRIDGE, the bridge or tap of the guest and a bridge of the other host, not '\(text)'"
                )
            }
            guard bridges.updateValue(parts[1], forKey: parts[0]) == nil else {
                throw ValidationError("--network says twice what becomes of '\(parts[0])'")
            }
        }
        return bridges.isEmpty ? nil : bridges
    }
}
