/// What a side can do beyond version 1 of the protocol as it was first spoken. Each side names its own in HELLO and WELCOME; what
/// the other one lacks is not used.
public enum Feature: String, Sendable, Hashable, CaseIterable {
    /// RELEASE says whether the guest ran, so that one that stood still stands still there.
    case runState = "run-state"
    /// OVERRULED tells a host that an operator of the other one has taken the guest.
    case overruling

    /// What this version can do, as it is sent.
    public static var own: [String] { allCases.map(\.rawValue) }

    /// What the other side can do. Names that this version does not know are passed over.
    public static func known(_ names: [String]?) -> Set<Feature> { Set((names ?? []).compactMap(Feature.init)) }
}
