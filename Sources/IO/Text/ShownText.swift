/// Text that somebody else has chosen: another host, a guest, a program.
extension StringProtocol {
    /// The text as it may be shown to people, or kept, as part of a line.
    ///
    /// Control characters, ends of lines and what changes the direction of writing become `?`. What is left out at the end is
    /// told by `...`.
    ///
    /// - Parameter limit: the most bytes of UTF-8, at least 3.
    /// - Returns: the text, of at most `limit` bytes.
    public func shown(most limit: Int) -> String {
        var shown = String.UnicodeScalarView()
        var (count, end) = (0, String.UnicodeScalarView.Index?.none)
        for scalar in unicodeScalars {
            let safe = scalar.mayBeShown ? scalar : "?"
            count += UTF8.width(safe)
            if count > limit {
                shown.removeSubrange((end ?? shown.startIndex)...)
                return String(shown) + "..."
            }
            shown.append(safe)
            // Up to here there is room for the dots.
            if count <= limit - 3 { end = shown.endIndex }
        }
        return String(shown)
    }

    /// The same in whole words: what is left out at the end begins behind a space, unless a single word is longer than half of the limit.
    ///
    /// - Parameter limit: the most bytes of UTF-8, at least 3.
    public func shown(wordsOf limit: Int) -> String {
        let all = shown(most: .max)
        guard all.utf8.count > limit else { return all }
        let cut = all.shown(most: limit).dropLast(3)
        let isWhole = all.utf8.dropFirst(cut.utf8.count).first == UInt8(ascii: " ")
        guard !isWhole, let space = cut.lastIndex(of: " "), cut[..<space].utf8.count > limit / 2 else {
            return "\(cut)..."
        }
        return "\(cut[..<space])..."
    }
}

extension Unicode.Scalar {
    fileprivate var mayBeShown: Bool {
        switch value {
        case 0..<32, 127..<160, 0x2028...0x202E, 0x2066...0x2069: false
        default: true
        }
    }
}
