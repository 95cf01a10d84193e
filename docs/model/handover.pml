/* Who may run the guest: the handover of one guest from a source host to a destination host, with faults.

   The model starts when the offer is accepted and the memory is on its way. `README.md` has the rules, what each of
   them is for, and what is left out; `check` runs everything.

   All steps that must happen sooner or later are options of one loop (System). Its `else` is reached when none of them
   is left: the system is at rest, and P2 says what then holds. All that may happen or not is in Environment: faults, of
   which there are at most FAULTS, and what the rules allow but do not demand. Every step changes the state for good, so
   that a run without rest would be a cycle, which the search for non-progress cycles finds.

   A step is as small as what a crash can tear apart: a record is written in one step and known to be durable in
   another, a command to QEMU is given in one and obeyed in another. */

#ifndef FAULTS
#define FAULTS 3
#endif

/* The source's QEMU. MOVING: the guest runs, its memory is sent. COMPLETED: paused, it never resumes by itself. */
#define MOVING 0
#define PRESWITCH 1
#define DEVICE 2
#define COMPLETED 3
#define RUNNING 4
#define DEAD 5
unsigned s : 3 = MOVING;
bit hasAsked;        /* PREPARED was sent, once */
bit goGiven;        /* migrate-continue is on its way; it outlives the agent that gave it */
bit runGiven;       /* so is migrate_cancel or cont */

/* The destination's QEMU. */
#define INCOMING 0
#define LOADED 1
#define OWNING 2
#define ENDED 3
unsigned d : 2 = INCOMING;
bit sent;           /* the last of the state has left the source */
bit arrived;        /* the destination has said that it has everything; that it died since does not take it back */
bit cut;            /* the stream of this migration is broken */

/* A record. MAYBE: written, but no fsync has returned without an error: the disk may have it or not. */
#define NONE 0
#define YES 1
#define MAYBE 2
unsigned released : 2;
unsigned reclaimed : 2;
unsigned prepared : 2;
unsigned owner : 2;
unsigned rolledBack : 2;    /* the destination's */
bit over;           /* the source's last record, confirmed or rolledBack: nothing is left to do */

/* The agents of the source: the first one, and the one that recovers (`crossdock recover`). */
#define GONE 0
#define MIGRATE 1
#define ASKED 2     /* migrate-continue is given, PREPARED is sent */
#define WENT 3      /* PREPARED is answered */
#define SEEN 4      /* QEMU said completed */
#define RELEASING 5 /* released is written, fsync is under way */
#define DOUBT 6     /* that fsync failed */
#define RELEASE 7   /* released is durable */
#define TAKE 8      /* the destination will never run the guest */
#define TAKING 9    /* reclaimed is written, fsync is under way */
#define TAKEN 10    /* reclaimed is durable */
#define ROLL 11     /* the guest never left */
#define ABORT 12    /* it runs here again, the destination is to be told */
#define READ 13     /* the recovering agent has the lock, but has not read the journal */
#define FENCED 14   /* the images are out of reach */
#define FROZEN 15   /* QEMU makes no step */
unsigned a : 4 = MIGRATE;
unsigned r : 4 = GONE;
bit frozen;         /* the source's QEMU */
bit stopped;        /* SIGSTOP: the first agent makes no step */

/* The watchdog. */
#define WATCH 1
#define KILL 2      /* SIGKILL is sent to the agent */
#define LOOK 3      /* the agent is dead, the lock is taken */
#define ACT 4       /* the journal was read, the source may run the guest */
#define KILL_KNOWING 5  /* only where the journal is read before the kill */
unsigned w : 3 = WATCH;

/* The lock of the source's journal. */
#define FREE 0
#define BY_A 1
#define BY_R 2
#define BY_W 3
#ifdef NO_R10
unsigned lock : 2 = FREE;
#else
unsigned lock : 2 = BY_A;
#endif

/* The agent of the destination. */
#define UP 1
#define W_PREPARED 2    /* the record is written, fsync is under way */
#define W_OWNER 3
#define W_ROLLEDBACK 4
#define FRESH 5         /* only where nothing is done about owner after a restart */
unsigned da : 3 = UP;

bit isNew;              /* nothing of the record that is being written was there before */

/* The network: what was sent and can still arrive. A message stays after it has arrived, so it can come again, late and
   in any order; a fault takes it away. */
bit toPREPARED; bit toRELEASE; bit toABORT;
bit isPREPARED; bit isOWNED; bit isREFUSED; bit isABORTED;

unsigned faults : 3 = FAULTS;

/* For the properties only. */
bit sourceRan;      /* since the handover of the state began, the source has run the guest */
bit destinationRan;
bit lossExcused;    /* a fault has killed the QEMU that had the guest's memory; no protocol could save it */
bit booted;         /* the source host has crashed and is up again */

/* What an agent takes from a journal. */
unsigned seenReleased : 2;
unsigned seenReclaimed : 2;

/* ---- The rules, each of which a mutation takes away. ---- */

#ifdef NO_R1
#define MAY_RUN(rel, rec) true
#else
#define MAY_RUN(rel, rec) ((rel) == NONE || (rec) == YES)
#endif

#ifdef NO_R2
#define RELEASE_MAY_BE_SENT(x) ((x) == RELEASE || (x) == RELEASING)
#else
#define RELEASE_MAY_BE_SENT(x) ((x) == RELEASE)
#endif

#ifdef NO_R3
#define SOURCE_IS_DONE (s == COMPLETED || s == DEVICE)
#else
#define SOURCE_IS_DONE (s == COMPLETED)
#endif

#ifdef NO_R4
#define DESTINATION_MAY_RUN (owner == YES || da == W_OWNER)
#else
#define DESTINATION_MAY_RUN (owner == YES)
#endif

#ifdef NO_R5_RELEASE
#define RELEASE_HAS_COME (toRELEASE || prepared == YES)
#else
#define RELEASE_HAS_COME toRELEASE
#endif
#ifdef NO_R5_ROLLEDBACK
#define OWNER_IS_OPEN (d == LOADED || owner == MAYBE)
#else
#ifdef NO_R5_LOADED
#define OWNER_IS_OPEN (rolledBack == NONE)
#else
/* A doubtful owner forbids to refuse, so it must become durable even when QEMU has died meanwhile. */
#define OWNER_IS_OPEN (rolledBack == NONE && (d == LOADED && g != LOST || owner == MAYBE))
#endif
#endif

/* The destination's agent answers ABORT and RELEASE from the record alone. */
#ifdef NO_R6
#define HAS_GIVEN_UP_FOR_ABORT (da != GONE && rolledBack != NONE)
#else
#define HAS_GIVEN_UP_FOR_ABORT (da == UP && rolledBack == YES)
#endif
#ifdef NO_R6_REFUSED
#define HAS_GIVEN_UP_FOR_RELEASE (da != GONE && rolledBack != NONE)
#else
#define HAS_GIVEN_UP_FOR_RELEASE (da == UP && rolledBack == YES)
#endif
#ifdef NO_R6_REFUSE
#define MUST_REFUSE false
#else
#define MUST_REFUSE (d == ENDED || g == LOST)
#endif
#ifdef NO_R16
#define MAY_STILL_REFUSE (owner != YES)
#else
#define MAY_STILL_REFUSE (owner == NONE)
#endif

#ifdef NO_R7
#define GUEST_IS_GIVEN_BACK true
#else
#define GUEST_IS_GIVEN_BACK isREFUSED
#endif
#ifdef NO_R7_DURABLE
#define RUNS_BEFORE_RECLAIMED (s != DEAD)
#define FROZEN_BEFORE_RECLAIMED 0
#else
#define RUNS_BEFORE_RECLAIMED runGiven
#define FROZEN_BEFORE_RECLAIMED frozen
#endif

#ifdef NO_R8
#define IN_DOUBT ROLL
#else
#ifdef NO_R8_SEND
#define IN_DOUBT RELEASE
#else
#define IN_DOUBT DOUBT
#endif
#endif
#ifdef NO_R8_RECLAIM
#define AFTER_DOUBT TAKEN
#else
#define AFTER_DOUBT TAKE
#endif

#ifdef NO_R11
#define PREPARED_IS_DURABLE (prepared != NONE || d == INCOMING)
#else
#define PREPARED_IS_DURABLE (prepared == YES)
#endif
#ifdef NO_R11_WAIT
#define MAY_GIVE_UP true
#else
#define MAY_GIVE_UP (prepared != YES)
#endif
#ifdef NO_R11_RESUME
#define AFTER_OWNER FRESH
#define MAY_RESUME (da == FRESH)
#else
#define AFTER_OWNER UP
#define MAY_RESUME (da == UP)
#endif

#ifdef NO_R15
#define MAY_START (s == DEAD)
#else
#define MAY_START (s == DEAD && lock == FREE)
#endif

/* A start script that looks at no journal is held back by the fence only: the images are renamed. Made between released
   and RELEASE, the fence is too late for that; made first, and QEMU looked at once more, it is in time. */
bit fenced;
#ifdef NO_R17
#define FENCING(x, awake) \
	:: d_step { awake && x == RELEASE && !fenced -> fenced = 1; printf("source agent: fences the images\n") }
#define IS_FENCED fenced
#define FENCE skip
#else
#define FENCING(x, awake)
#define IS_FENCED true
#define FENCE fenced = 1
#endif

/* QEMU obeys every client of its monitors. One that is frozen obeys nobody. */
#ifdef NO_R18
#define FREEZE skip
#else
#define FREEZE frozen = (s != DEAD)
#endif

/* What the guest did before the migration stopped it: it ran, it stood still (paused, a failed disk, a panic), or it was in a
   state that no other QEMU can take over (shut down). */
#define RAN 0
#define STOOD 1
#define LOST 2
unsigned g : 2 = RAN;
#ifdef NO_R19
#define CAN_BE_OWNED true
#else
#define CAN_BE_OWNED (g != LOST)
#endif
#ifdef NO_R20
#define STANDS_STILL false
#else
#define STANDS_STILL (g == STOOD)
#endif

/* An unrelated host offers a guest of the same name to the agent of the source's host. */
bit offered;
#ifdef NO_R21
#define IS_SUPERSEDED offered
#else
#define IS_SUPERSEDED false
#endif

/* The transitions of both agents, for `transitions`. What the destination's is up to follows from its records. */
#ifdef TELL
#define TOLD(text) printf(text)
#define D_STATE (da == W_PREPARED -> 1 : (da == W_OWNER -> 2 : (da == W_ROLLEDBACK -> 3 : (owner == YES -> 4 : \
	(owner == MAYBE -> 5 : (rolledBack == YES -> 6 : (rolledBack == MAYBE -> 7 : (prepared == YES -> 8 : 0))))))))
hidden byte before;
#define FROM before = D_STATE
#define TO printf("destination %d %d\n", before, D_STATE)
#else
#define TOLD(text) skip
#define FROM skip
#define TO skip
#endif

/* ---- The properties. Each can be checked alone. ---- */

#ifdef ONLY_P2
#define P1(what) skip
#else
#define P1(what) assert(what)
#endif
#ifdef ONLY_P1
#define P2(what) skip
#else
#define P2(what) assert(what)
#endif

/* P1: the guest never runs at the source once it has run at the destination, and the other way round. */
inline sourceRuns() {
	P1(!destinationRan);
	s = RUNNING; sourceRan = 1
}

/* What the destination has is the state in which the source stopped; it is stale once the source has gone on. */
inline destinationRuns() {
	P1(!sourceRan && s != MOVING);
	P1(g != LOST);
	d = OWNING; destinationRan = 1
}

/* ---- What several steps do ---- */

/* Reads a record to act on it. R14: what was read is made durable first, or found to be absent for good. */
inline look(record, seen) {
	if
	:: record == MAYBE -> if :: seen = NONE :: seen = YES fi
	:: else -> seen = record
	fi;
#ifndef NO_R14
	record = seen
#endif
}

/* What a crash of the host leaves of a record. */
inline settle(record) {
	if
	:: record == MAYBE -> if :: record = NONE :: record = YES fi
	:: else
	fi
}

/* A message is sent to a process that is there: to connect to none fails, and is tried again. */
#define SOURCE_LISTENS (a != GONE || r != GONE)
#define DESTINATION_LISTENS (da != GONE)

inline leave(x, me) {
	x = GONE;
	lock = (lock == me -> FREE : lock)
}

inline endFirst() {
	leave(a, BY_A);
	stopped = 0; cut = 1
}

/* The loss of the guest's memory is no fault of the protocol when the source still had the guest, has it again or is
   about to, or when the destination has no copy or was told to drop it. */
inline sourceDies() {
	if
	:: s != DEAD && (released != YES || reclaimed != NONE || s == RUNNING
			|| d == ENDED || toABORT || rolledBack != NONE) -> lossExcused = 1
	:: else
	fi;
	s = DEAD; cut = 1; goGiven = 0; runGiven = 0; frozen = 0
}

/* Nor when the destination was about to have the guest, or the source has no copy. */
inline destinationDies() {
	if
	:: d != ENDED && (owner != NONE || s == DEAD) -> lossExcused = 1
	:: else
	fi;
	d = ENDED; cut = 1
}

/* ---- Steps of both agents of the source. `me` is the name that the lock knows, `awake` is false while stopped. ----
   What was in doubt is durable with the append that succeeds next; it matters with `confirmed` only. */

#define AGENT(x, me, awake) \
	FENCING(x, awake) \
	:: d_step { awake && RELEASE_MAY_BE_SENT(x) && IS_FENCED && DESTINATION_LISTENS && \
			!toRELEASE && !isOWNED && !isREFUSED -> \
		toRELEASE = 1; printf("source agent: RELEASE\n") } \
	:: d_step { awake && x == RELEASE && isOWNED -> \
		over = 1; released = YES; s = DEAD; runGiven = 0; frozen = 0; leave(x, me); \
		TOLD("transition RELEASE GONE\n"); \
		printf("source agent: confirmed, old QEMU ends\n") } \
	:: d_step { awake && x == RELEASE && GUEST_IS_GIVEN_BACK -> \
		x = TAKE; TOLD("transition RELEASE TAKE\n"); printf("source agent: takes the guest back\n") } \
	:: d_step { awake && x == TAKE -> \
		reclaimed = (reclaimed == YES -> YES : MAYBE); runGiven = RUNS_BEFORE_RECLAIMED; \
		frozen = FROZEN_BEFORE_RECLAIMED; \
		x = TAKING; TOLD("transition TAKE TAKING\n"); printf("source agent: writes reclaimed\n") } \
	:: d_step { awake && x == TAKING -> \
		reclaimed = YES; x = TAKEN; TOLD("transition TAKING TAKEN\n"); \
		printf("source agent: reclaimed is durable\n") } \
	:: d_step { awake && x == TAKEN -> \
		runGiven = (s != DEAD); over = 1; fenced = 0; frozen = 0; leave(x, me); TOLD("transition TAKEN GONE\n"); \
		printf("source agent: cont, ends\n") } \
	:: d_step { awake && x == ROLL -> \
		runGiven = (s != DEAD); fenced = 0; frozen = 0; x = ABORT; TOLD("transition ROLL ABORT\n"); \
		printf("source agent: migrate_cancel, cont\n") } \
	:: d_step { awake && x == ABORT && DESTINATION_LISTENS && !toABORT && !isABORTED -> \
		toABORT = 1; printf("source agent: ABORT\n") } \
	:: d_step { awake && x == ABORT && isABORTED -> \
		over = 1; leave(x, me); TOLD("transition ABORT GONE\n"); printf("source agent: rolledBack, ends\n") }

active proctype System() {
	do

	/* The source's QEMU. At pre-switchover it waits for ever. */
	:: d_step { s == MOVING && !cut -> s = PRESWITCH; printf("source QEMU: pre-switchover\n") }
	:: d_step { s == MOVING && cut -> sourceRuns(); printf("source QEMU: failed, runs on\n") }
	:: d_step { goGiven && s == PRESWITCH -> goGiven = 0; s = DEVICE; sent = 1; printf("source QEMU: device\n") }
	:: d_step { goGiven && s != PRESWITCH -> goGiven = 0 }
	:: d_step { s == DEVICE && arrived -> s = COMPLETED; printf("source QEMU: completed\n") }
	:: d_step { s == DEVICE && cut -> sourceRuns(); printf("source QEMU: failed, resumes the guest by itself\n") }
	:: d_step { runGiven && !frozen && s != RUNNING -> runGiven = 0; cut = 1; sourceRuns(); printf("source QEMU: runs\n") }
	:: d_step { runGiven && !frozen && s == RUNNING -> runGiven = 0 }

	/* The destination's QEMU. What is in the buffers can still arrive when the stream is broken. */
	:: d_step { d == INCOMING && sent ->
#ifdef NO_R12
		destinationRuns();
#else
		d = LOADED;
#endif
		arrived = 1;
		printf("destination QEMU: loaded\n") }
	:: d_step { d == INCOMING && cut -> d = ENDED; printf("destination QEMU: ends, its stream is broken\n") }

	/* The first agent. Until it has written released, its deadline can end everything. */
	/* QEMU's last state travels beside PREPARED and its answer: neither waits for the other, released waits for both. */
	:: d_step { !stopped && a == MIGRATE && s == PRESWITCH && CAN_BE_OWNED -> goGiven = 1; a = ASKED;
		TOLD("transition MIGRATE ASKED\n"); printf("source agent: migrate-continue\n") }
	:: d_step { !stopped && a == ASKED && !hasAsked -> hasAsked = 1; toPREPARED = 1; printf("source agent: PREPARED\n") }
	:: d_step { !stopped && a == ASKED && isPREPARED -> a = WENT;
		TOLD("transition ASKED WENT\n"); printf("source agent: PREPARED is answered\n") }
	:: d_step { !stopped && a == WENT && SOURCE_IS_DONE -> a = SEEN;
		TOLD("transition WENT SEEN\n"); printf("source agent: sees completed\n") }
	:: d_step { !stopped && a == SEEN -> FENCE; a = FENCED;
		TOLD("transition SEEN FENCED\n"); printf("source agent: fences the images\n") }
	:: d_step { !stopped && a == FENCED && SOURCE_IS_DONE -> FREEZE; a = FROZEN;
		TOLD("transition FENCED FROZEN\n"); printf("source agent: freezes QEMU\n") }
	:: d_step { !stopped && a == FROZEN && SOURCE_IS_DONE -> released = MAYBE; a = RELEASING;
		TOLD("transition FROZEN RELEASING\n"); printf("source agent: writes released\n") }
	:: d_step { !stopped && a == RELEASING -> released = YES; a = RELEASE;
		TOLD("transition RELEASING RELEASE\n"); printf("source agent: released is durable\n") }
	/* An append that fails before anything is in the file. */
	:: d_step { !stopped && a == RELEASING && released == MAYBE -> released = NONE; a = ROLL;
		TOLD("transition RELEASING ROLL\n"); printf("source agent: released cannot be written\n") }
	:: d_step { !stopped && a == MIGRATE -> a = ROLL; TOLD("transition MIGRATE ROLL\n"); printf("source agent: rolls back\n") }
	:: d_step { !stopped && a == ASKED -> a = ROLL; TOLD("transition ASKED ROLL\n"); printf("source agent: rolls back\n") }
	:: d_step { !stopped && a == WENT -> a = ROLL; TOLD("transition WENT ROLL\n"); printf("source agent: rolls back\n") }
	:: d_step { !stopped && a == SEEN -> a = ROLL; TOLD("transition SEEN ROLL\n"); printf("source agent: rolls back\n") }
	:: d_step { !stopped && a == FENCED -> a = ROLL; TOLD("transition FENCED ROLL\n"); printf("source agent: rolls back\n") }
	:: d_step { !stopped && a == FROZEN -> a = ROLL; TOLD("transition FROZEN ROLL\n"); printf("source agent: rolls back\n") }
	:: d_step { !stopped && a == DOUBT && DESTINATION_LISTENS && !toABORT && !isABORTED -> toABORT = 1;
		printf("source agent: ABORT, in doubt\n") }
	:: d_step { !stopped && a == DOUBT && isABORTED -> a = AFTER_DOUBT; TOLD("transition DOUBT TAKE\n");
		printf("source agent: the abort is acknowledged\n") }
	AGENT(a, BY_A, !stopped)

#ifdef NO_R10_SENDER
	:: d_step { released == YES && DESTINATION_LISTENS && !toRELEASE && !isOWNED && !isREFUSED ->
		toRELEASE = 1; printf("somebody: RELEASE\n") }
#endif

	/* The recovering agent: started by the watchdog, the operator or the boot. Never more than one has the lock. */
	:: d_step { r == GONE && lock == FREE && !over -> lock = BY_R; r = READ; printf("recover: has the lock\n") }
#ifdef NO_R21
	:: d_step { r == READ && offered -> over = 1; leave(r, BY_R); printf("recover: followed by a later one\n") }
#endif
	:: atomic { r == READ && !IS_SUPERSEDED ->
		look(released, seenReleased); look(reclaimed, seenReclaimed);
		if
		:: seenReleased == YES && seenReclaimed == YES -> r = TAKEN
		:: seenReleased == YES && seenReclaimed == NONE && !MAY_RUN(YES, NONE) -> r = RELEASE
		:: else -> r = ROLL
		fi;
		printf("recover: reads released %d reclaimed %d\n", seenReleased, seenReclaimed);
		seenReleased = 0; seenReclaimed = 0 }
	AGENT(r, BY_R, true)

	/* The watchdog. It acts on a stuck agent as on a dead one. */
	:: d_step { w == WATCH && over -> w = GONE }
#ifdef NO_R9
	:: d_step { w == WATCH && !over && (stopped || a == GONE) -> w = LOOK;
		printf("watchdog: the agent is stuck or dead\n") }
#else
#ifdef NO_R9_REREAD
	:: atomic { w == WATCH && !over && (stopped || a == GONE) ->
		look(released, seenReleased); look(reclaimed, seenReclaimed);
		if
		:: MAY_RUN(seenReleased, seenReclaimed) -> w = KILL_KNOWING
		:: else -> w = KILL
		fi;
		seenReleased = 0; seenReclaimed = 0; printf("watchdog: reads the journal\n") }
	:: d_step { w == KILL_KNOWING && a == GONE && lock == FREE -> lock = BY_W; w = ACT }
	:: d_step { w == KILL_KNOWING && a != GONE -> endFirst(); printf("source agent: killed by the watchdog\n") }
#else
	:: d_step { w == WATCH && !over && (stopped || a == GONE) -> w = KILL;
		printf("watchdog: the agent is stuck or dead\n") }
#endif
#endif
#ifndef NO_R9_KILL
	:: d_step { w == KILL && a != GONE -> endFirst(); printf("source agent: killed by the watchdog\n") }
#endif
#ifdef NO_R9_LOCK
	:: d_step { w == KILL && a == GONE -> w = LOOK }
#else
	:: d_step { w == KILL && a == GONE && lock == FREE -> lock = BY_W; w = LOOK; printf("watchdog: has the lock\n") }
#endif
	:: atomic { w == LOOK ->
		look(released, seenReleased); look(reclaimed, seenReclaimed);
		if
		:: MAY_RUN(seenReleased, seenReclaimed) -> w = ACT
		:: else -> leave(w, BY_W)
		fi;
		printf("watchdog: reads released %d reclaimed %d\n", seenReleased, seenReclaimed);
		seenReleased = 0; seenReclaimed = 0 }
	:: d_step { w == ACT -> runGiven = (s != DEAD); fenced = 0; frozen = 0; leave(w, BY_W); printf("watchdog: migrate_cancel, cont\n") }
	/* Without a watchdog it is the operator who kills a stuck agent. */
	:: d_step { stopped && w == GONE -> endFirst(); printf("source agent: killed by the operator\n") }

	/* The source's guest is started anew from its disks, by the operator or at boot. */
	:: atomic { MAY_START && !(released == YES && reclaimed == NONE) ->
		look(released, seenReleased); look(reclaimed, seenReclaimed);
		if
		:: MAY_RUN(seenReleased, seenReclaimed) ->
			P2(lossExcused); sourceRuns(); printf("source: the guest is started from its disks\n")
		:: else
		fi;
		seenReleased = 0; seenReclaimed = 0 }
#ifdef NO_R13
	:: d_step { booted && s == DEAD -> sourceRuns(); printf("source: the guest is started at boot\n") }
#endif

	/* The destination's agent. */
	:: d_step { da == UP && toPREPARED && prepared != YES && rolledBack == NONE && owner == NONE && d != ENDED ->
		FROM; isNew = (prepared == NONE); prepared = MAYBE; da = W_PREPARED; TO; printf("destination agent: writes prepared\n") }
	:: d_step { da == W_PREPARED -> FROM; prepared = YES; da = UP; TO; printf("destination agent: prepared is durable\n") }
	:: d_step { SOURCE_LISTENS && !isPREPARED && da == UP && toPREPARED && PREPARED_IS_DURABLE &&
			rolledBack == NONE && owner == NONE ->
		isPREPARED = 1; printf("destination agent: PREPARED\n") }
	:: d_step { da == UP && RELEASE_HAS_COME && owner != YES && OWNER_IS_OPEN ->
		FROM; isNew = (owner == NONE); owner = MAYBE; da = W_OWNER; TO; printf("destination agent: writes owner\n") }
	:: d_step { da == W_OWNER -> FROM; owner = YES; da = AFTER_OWNER; TO; printf("destination agent: owner is durable\n") }
	:: d_step { (MAY_RESUME || da == W_OWNER) && DESTINATION_MAY_RUN && d == LOADED ->
		P1(STANDS_STILL || g == RAN);
		destinationRuns(); da = (da == FRESH -> UP : da);
		printf("destination agent: has the guest, and says cont if it ran\n") }
#ifdef NO_R11_RESUME
	:: d_step { da == FRESH && d == ENDED -> da = UP }
#endif
	:: d_step { da == UP && owner == YES && d == ENDED ->
		P2(lossExcused); destinationRuns(); printf("destination: the guest is started from its disks\n") }
	:: d_step { SOURCE_LISTENS && !isOWNED && da == UP && toRELEASE && owner == YES && d != LOADED ->
		isOWNED = 1; printf("destination agent: OWNED\n") }
	/* It gives up: on ABORT, when QEMU has died, and when it does not know whether it has given up before. */
	:: d_step { da == UP && rolledBack != YES && (rolledBack == MAYBE ||
			MAY_STILL_REFUSE && (toABORT || MUST_REFUSE)) ->
		FROM; isNew = (rolledBack == NONE); rolledBack = MAYBE; da = W_ROLLEDBACK; TO; printf("destination agent: writes rolledBack\n") }
	:: d_step { da == W_ROLLEDBACK -> FROM; rolledBack = YES; da = UP; TO; printf("destination agent: rolledBack is durable\n") }
	:: d_step { da == UP && rolledBack == YES && d != ENDED ->
		d = ENDED; cut = 1; printf("destination agent: ends QEMU\n") }
	:: d_step { SOURCE_LISTENS && !isABORTED && (toABORT || toPREPARED) && HAS_GIVEN_UP_FOR_ABORT ->
		isABORTED = 1; printf("destination agent: ABORT\n") }
	:: d_step { SOURCE_LISTENS && !isREFUSED && toRELEASE && HAS_GIVEN_UP_FOR_RELEASE ->
		isREFUSED = 1; printf("destination agent: REFUSED\n") }
	:: atomic { da == GONE -> settle(prepared); settle(owner); settle(rolledBack); da = UP;
		printf("destination agent: starts, prepared %d owner %d rolledBack %d\n", prepared, owner, rolledBack) }

	/* P2: at rest exactly one side runs the guest, and both journals say which. */
	:: atomic { else ->
		P2(over && a == GONE && r == GONE && lock == FREE
			&& (d == OWNING && owner == YES && s == DEAD
				|| s == RUNNING && rolledBack == YES && d == ENDED)) };
progress:	skip
	od
}

#define FAULT(what) faults > 0 && (what) -> faults--

active proctype Environment() {
end:	do

	/* Crashes. */
	:: d_step { FAULT(a != GONE); endFirst(); printf("FAULT source agent killed\n") }
	:: d_step { FAULT(r != GONE); leave(r, BY_R); printf("FAULT recovering agent killed\n") }
	:: d_step { FAULT(w != GONE); leave(w, BY_W); printf("FAULT watchdog killed\n") }
	:: d_step { FAULT(a != GONE && !stopped); stopped = 1; printf("FAULT source agent stopped\n") }
	:: d_step { stopped -> stopped = 0; printf("source agent goes on\n") }
	:: d_step { FAULT(s != DEAD); sourceDies(); printf("FAULT source QEMU killed\n") }
	:: d_step { FAULT(d != ENDED); destinationDies(); printf("FAULT destination QEMU killed\n") }
	:: d_step { FAULT(da != GONE); da = GONE; cut = 1; printf("FAULT destination agent killed\n") }
	:: atomic { FAULT(true);
		sourceDies(); endFirst(); leave(r, BY_R); leave(w, BY_W);
		settle(released); settle(reclaimed);
#ifdef NO_R13
		booted = 1;
#endif
		printf("FAULT source host crashed\n") }
	:: atomic { FAULT(d != ENDED || da != GONE);
		destinationDies(); da = GONE;
		settle(prepared); settle(owner); settle(rolledBack);
		printf("FAULT destination host crashed\n") }

	/* An fsync that fails: the record stays as doubtful as it was. */
	:: d_step { FAULT(!stopped && a == RELEASING); a = IN_DOUBT; TOLD("transition RELEASING DOUBT\n"); printf("FAULT released is doubtful\n") }
	:: d_step { FAULT(!stopped && a == TAKING); a = TAKE; TOLD("transition TAKING TAKE\n"); printf("FAULT reclaimed is doubtful\n") }
	:: d_step { FAULT(r == TAKING); r = TAKE; printf("FAULT reclaimed is doubtful\n") }
	:: d_step { FAULT(da == W_OWNER || da == W_ROLLEDBACK); FROM; da = UP; TO;
		printf("FAULT a record of the destination is doubtful\n") }

	/* An append that fails before anything is in the file. */
	:: d_step { FAULT(da == W_PREPARED && isNew); FROM; prepared = NONE; isNew = 1; rolledBack = MAYBE; da = W_ROLLEDBACK; TO;
		printf("FAULT prepared cannot be written, the destination gives up\n") }
	:: d_step { FAULT(da == W_PREPARED); FROM; isNew = 1; rolledBack = MAYBE; da = W_ROLLEDBACK; TO;
		printf("FAULT prepared is doubtful, the destination gives up\n") }
	:: d_step { FAULT(da == W_OWNER && isNew); FROM; owner = NONE; da = UP; TO;
		printf("FAULT owner cannot be written\n") }
	:: d_step { FAULT(da == W_ROLLEDBACK && isNew); FROM; rolledBack = NONE; da = UP; TO;
		printf("FAULT rolledBack cannot be written\n") }

	/* Before it takes the guest over, the destination finds that what it has is damaged. */
	:: d_step { FAULT(da == UP && toRELEASE && d == LOADED && owner == NONE && rolledBack == NONE);
		FROM; isNew = 1; lossExcused = 1; rolledBack = MAYBE; da = W_ROLLEDBACK; TO; printf("FAULT destination has damaged data\n") }

	/* The network. */
	:: d_step { FAULT(toPREPARED); toPREPARED = 0; printf("FAULT PREPARED lost\n") }
	:: d_step { FAULT(toRELEASE); toRELEASE = 0; printf("FAULT RELEASE lost\n") }
	:: d_step { FAULT(toABORT); toABORT = 0; printf("FAULT ABORT lost\n") }
	:: d_step { FAULT(isPREPARED); isPREPARED = 0; printf("FAULT answer PREPARED lost\n") }
	:: d_step { FAULT(isOWNED); isOWNED = 0; printf("FAULT OWNED lost\n") }
	:: d_step { FAULT(isREFUSED); isREFUSED = 0; printf("FAULT REFUSED lost\n") }
	:: d_step { FAULT(isABORTED); isABORTED = 0; printf("FAULT answer ABORT lost\n") }
	:: d_step { FAULT(true); cut = 1; toPREPARED = 0; toRELEASE = 0; toABORT = 0;
		isPREPARED = 0; isOWNED = 0; isREFUSED = 0; isABORTED = 0; printf("FAULT connections lost\n") }
	/* What was on its way to a process that died may be lost with it. */
	:: d_step { da == GONE && (toPREPARED || toRELEASE || toABORT) -> toPREPARED = 0; toRELEASE = 0; toABORT = 0 }
	:: d_step { a == GONE && r == GONE && (isPREPARED || isOWNED || isREFUSED || isABORTED) ->
		isPREPARED = 0; isOWNED = 0; isREFUSED = 0; isABORTED = 0 }

	/* What may happen without a fault. */
	:: d_step { s == DEAD && !fenced -> sourceRuns(); printf("source: a script starts the guest\n") }
	:: d_step { s == COMPLETED && !frozen -> sourceRuns(); printf("source: another client says cont\n") }
	:: d_step { s == MOVING && g == RAN -> g = STOOD; printf("guest: stands still\n") }
	:: d_step { s == MOVING && g != LOST -> g = LOST; printf("guest: shuts down\n") }
	:: d_step { !offered && released != NONE -> offered = 1; printf("source: an unrelated offer of the guest\n") }
	:: d_step { s == MOVING || s == DEVICE -> cut = 1; sourceRuns(); printf("source QEMU: migration failed\n") }
	:: d_step { da == UP && MAY_GIVE_UP && rolledBack == NONE && owner == NONE ->
		FROM; isNew = (rolledBack == NONE); rolledBack = MAYBE; da = W_ROLLEDBACK; TO; printf("destination agent: gives up, writes rolledBack\n") }
	od
}
