//! Command tags: what a CommandComplete reports of the statement that has ended.
//!
//! The texts are those of src/include/tcop/cmdtaglist.h of PostgreSQL. Unlike the text of a statement, a tag is certain:
//! the statement was executed, and was of this kind.

/// The kind of a statement that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// ALTER DATABASE, ALTER ROLE or ALTER SYSTEM, which may change what a new session finds.
    AlterDefaults,
    /// BEGIN or START TRANSACTION.
    Begin,
    /// CALL.
    Call,
    /// CLOSE, of one cursor or of all.
    CloseCursor,
    /// COMMIT or END, with or without AND CHAIN, of a transaction that has not failed.
    Commit,
    /// DEALLOCATE of one statement.
    Deallocate,
    /// DEALLOCATE ALL.
    DeallocateAll,
    /// DECLARE CURSOR.
    DeclareCursor,
    /// A statement that may change what others mean or return: CREATE, ALTER, DROP and the like.
    Definition,
    /// DISCARD.
    Discard(Discard),
    /// DO.
    Do,
    /// LISTEN.
    Listen,
    /// LOAD.
    Load,
    /// PREPARE.
    Prepare,
    /// PREPARE TRANSACTION: the end of the transaction for this session, which keeps its settings.
    PrepareTransaction,
    /// RELEASE.
    Release,
    /// RESET.
    Reset,
    /// ROLLBACK, to a savepoint or of the transaction; also the end of a failed transaction by COMMIT.
    Rollback,
    /// SAVEPOINT.
    Savepoint,
    /// SET.
    Set,
    /// UNLISTEN.
    Unlisten,
    /// Any other.
    Other,
}

/// What a DISCARD discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// Everything.
    All,
    /// Plans, which are no state.
    Plans,
    /// The remembered values of sequences.
    Sequences,
    /// Temporary tables.
    Temporary,
}

impl Command {
    /// No tag that is more than [`Other`](Self::Other) or [`Definition`](Self::Definition) is longer.
    pub const LONGEST: usize = b"DISCARD SEQUENCES".len();

    /// The command of a tag, without the zero byte that ends it in the message.
    pub fn of(tag: &[u8]) -> Self {
        match tag {
            b"BEGIN" | b"START TRANSACTION" => Self::Begin,
            b"COMMIT" => Self::Commit,
            b"ROLLBACK" => Self::Rollback,
            b"SET" => Self::Set,
            b"RESET" => Self::Reset,
            b"SAVEPOINT" => Self::Savepoint,
            b"RELEASE" => Self::Release,
            b"DO" => Self::Do,
            b"CALL" => Self::Call,
            b"PREPARE" => Self::Prepare,
            b"DEALLOCATE" => Self::Deallocate,
            b"DEALLOCATE ALL" => Self::DeallocateAll,
            b"DECLARE CURSOR" => Self::DeclareCursor,
            b"CLOSE CURSOR" | b"CLOSE CURSOR ALL" | b"CLOSE" => Self::CloseCursor,
            b"LISTEN" => Self::Listen,
            b"UNLISTEN" => Self::Unlisten,
            b"LOAD" => Self::Load,
            b"DISCARD ALL" => Self::Discard(Discard::All),
            b"DISCARD PLANS" => Self::Discard(Discard::Plans),
            b"DISCARD SEQUENCES" => Self::Discard(Discard::Sequences),
            b"DISCARD TEMP" => Self::Discard(Discard::Temporary),
            b"PREPARE TRANSACTION" => Self::PrepareTransaction,
            b"ALTER DATABASE" | b"ALTER ROLE" | b"ALTER SYSTEM" => Self::AlterDefaults,
            // Another session may have prepared a definition.
            b"COMMIT PREPARED" | b"SELECT INTO" | b"IMPORT FOREIGN SCHEMA" => Self::Definition,
            _ if DEFINITIONS.iter().any(|verb| tag.starts_with(verb)) => Self::Definition,
            _ => Self::Other,
        }
    }
}

const DEFINITIONS: [&[u8]; 3] = [b"CREATE ", b"ALTER ", b"DROP "];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tag_of_session_state_is_known() {
        for (tag, command) in [
            ("START TRANSACTION", Command::Begin),
            ("ROLLBACK", Command::Rollback),
            ("DEALLOCATE ALL", Command::DeallocateAll),
            ("DISCARD SEQUENCES", Command::Discard(Discard::Sequences)),
            ("CLOSE CURSOR ALL", Command::CloseCursor),
            ("ALTER ROLE", Command::AlterDefaults),
            ("ALTER TABLE", Command::Definition),
            ("CREATE TABLE AS", Command::Definition),
            ("COMMIT PREPARED", Command::Definition),
            ("SET CONSTRAINTS", Command::Other),
            ("SELECT 1", Command::Other),
            ("", Command::Other),
        ] {
            assert_eq!(Command::of(tag.as_bytes()), command, "{tag}");
        }
    }
}
