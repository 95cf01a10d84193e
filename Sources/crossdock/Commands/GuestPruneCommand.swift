import ArgumentParser
import Emulator
import IO
import Migration
import Source

extension GuestCommand {
    struct Prune: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Deletes the old images of guests that have moved away, and shows which are kept.",
            discussion: """
                Deleted is what has been kept for its --keep-source; crossdock-prune.timer does that by itself. With --all it is everything \
                that guests have left here that certainly belong to another host. Images whose digests differed are kept until 'crossdock \
                guest forget'.
                """
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "Only of this guest.")
        var name: String?
        @Flag(help: "Also before their time.")
        var all = false
        @Flag(help: "Delete nothing, and show what is kept.")
        var dryRun = false
        @Flag(help: "Print what is kept as JSON.")
        var json = false

        func run() async throws {
            try await failing {
                try common.checkAccess()
                let migrations = common.migrations
                // A guest that has left may be known by its migrations only.
                if let name, try common.guests.load(name) == nil, try !migrations.knows(name) {
                    throw common.guests.unknown(name)
                }
                if !dryRun {
                    let before = FencedImages.kept(migrations, of: name)
                    for path in FencedImages.purge(migrations, of: name, now: all ? .max : nil) where !json {
                        let bytes = before.first { $0.path == path }?.bytes ?? 0
                        output("deleted \(path), \(ProgressRenderer.bytes(Double(bytes)))\n")
                    }
                }
                let kept = FencedImages.kept(migrations, of: name)
                if json {
                    output(String(decoding: try JSONText.encode(kept, pretty: true), as: UTF8.self) + "\n")
                } else if kept.isEmpty {
                    output("No old images\(name.map { " of guest '\($0)'" } ?? "") are kept \(common.place).\n")
                } else {
                    output(Table.render(["GUEST", "WENT TO", "SIZE", "KEPT UNTIL", "IMAGE"], kept.map(\.row)))
                }
            }
        }
    }
}

extension KeptImage {
    /// Until when it is kept, as words: a time, or what somebody has to do.
    var term: String { isConfirmed ? until.map(UTCTime.text) ?? "somebody looks" : "\(destination) confirms" }

    /// A row of the table.
    fileprivate var row: [String] {
        [guest, destination, ProgressRenderer.bytes(Double(bytes)), term, path]
    }
}
