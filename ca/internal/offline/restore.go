// Restoring a store from a backup. What was written after the backup is lost,
// and so is the knowledge of what was: the store goes on in the next epoch
// (store.NextEpoch), above every number that others can have seen, and without
// the records that would be dangerous to bring back.

package offline

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"strings"
	"time"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/snapshot"
	"merlon.dev/ca/internal/trust"
)

// RestoreOptions say what a restore may do.
type RestoreOptions struct {
	// AcceptLoss: go on without what was written after the backup.
	AcceptLoss bool
	// Replaces is the folder of the Badger store that the backup replaces,
	// moved out of the way. If it ended with what is in the backup, nothing is
	// lost.
	Replaces string
}

// Restored says what a restore did.
type Restored struct {
	// Backup is what was restored, Place where to.
	Backup StoreReport
	Place  string
	// Lossless: nothing was written after the backup.
	Lossless bool
	// Keys were restored; Tokens and Replicas were left out, being dangerous to
	// bring back.
	Keys             uint64
	Tokens, Replicas []string
	// Revision is the one that the store goes on above.
	Revision uint64
	// Since is what the audit log says was done after the backup.
	Since []Act

	// jwtKeys are those of Replicas; instead is what is written in place of what
	// was left out, in order of keys.
	jwtKeys []string
	instead []store.KV
}

// Act is an administrator's act that a restore takes back.
type Act struct {
	Time             time.Time
	Actor, What, Who string
}

// LossError says what a restore would lose.
type LossError struct {
	Backup StoreReport
	// Head is the last revision of the store that is replaced; 0 where it is
	// not known.
	Head uint64
	// Since is what the audit log says was done after the backup.
	Since []Act
}

// Error implements error.
func (e *LossError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "everything written after revision %d of %s would be lost", e.Backup.Revision, e.Backup.CreatedAt.Format(time.RFC3339))
	switch e.Head {
	case 0:
	case e.Backup.Revision:
		b.WriteString(" (the store that it replaces ended at that revision too, and held something else: it is another one, or had another history)")
	default:
		fmt.Fprintf(&b, " (the store ended at revision %d)", e.Head)
	}
	b.WriteString(": entries and agents made since are gone, entries deleted since are back, and revocations made since are forgotten")
	return b.String()
}

// Restore fills the empty store of cfg, whose CA must not run, from a
// backup file. Without AcceptLoss a *LossError says what would be lost, unless
// nothing would.
func Restore(ctx context.Context, cfg config.Config, path string, o RestoreOptions) (_ Restored, err error) {
	defer func() { err = opening.Hinted(err) }()
	backup, err := VerifyBackup(path)
	if err != nil {
		return Restored{}, err
	}
	if backup.Problem != "" {
		return Restored{}, opening.WithHint(fmt.Errorf("%s: %s", path, backup.Problem), "use another backup; nothing was changed")
	}
	r := Restored{Backup: backup, Place: cfg.StorePlace(), Revision: backup.Revision, Since: actsSince(cfg, backup.CreatedAt)}
	if err := checkEmpty(ctx, cfg); err != nil {
		return r, err
	}
	if _, err := opening.BeginOfLog(cfg); err != nil { // record goes on with it
		return r, err
	}
	lost, err := lostContent(o.Replaces)
	if err != nil {
		return r, err
	}
	all, err := holdsAll(path, lost)
	if err != nil {
		return r, err
	}
	seen, err := opening.SeenEpoch(ctx, cfg)
	if err != nil {
		return r, err
	}
	if r.Lossless = all && store.CheckEpoch(lost.Revision, seen) == nil; !r.Lossless {
		if !o.AcceptLoss {
			return r, &LossError{backup, lost.Revision, r.Since}
		}
		r.Revision = store.NextEpoch(max(backup.Revision, lost.Revision, seen))
	}
	if !r.Lossless {
		if err := r.readBackup(path, func(pairs iter.Seq2[store.KV, error]) error { return r.leaveOut(cfg, pairs) }); err != nil {
			return r, err
		}
	}
	if err := r.fill(ctx, cfg, path); err != nil {
		return r, err
	}
	// In this order: the next start writes down an epoch that is not remembered.
	return r, errors.Join(r.record(ctx, cfg), opening.RememberEpoch(cfg, r.Revision))
}

// checkEmpty refuses a store that is there.
func checkEmpty(ctx context.Context, cfg config.Config) error {
	if err := checkStopped(cfg); err != nil {
		return err
	}
	there, err := opening.Exists(ctx, cfg)
	if err != nil {
		return err
	}
	if cfg.Store == config.Etcd {
		if !there {
			return nil
		}
		return opening.WithHint(
			fmt.Errorf("there is a store already: %s", cfg.StorePlace()),
			"choose another etcd_prefix, or back it up and remove it: etcdctl del --prefix "+cfg.EtcdKeys(),
		)
	}
	if there {
		dir := cfg.StoreDir()
		return opening.WithHint(fmt.Errorf("there is a store already: %s", dir), fmt.Sprintf("move it away and name it: mv %s %s.old, then --replaces %s.old", dir, dir, dir))
	}
	return opening.CheckOwner(cfg.StoreDir())
}

// lostContent is what the store in dir held at the last revision that it has
// acknowledged, also where it is damaged; zero if that is not known.
func lostContent(dir string) (badger.Content, error) {
	if dir == "" {
		return badger.Content{}, nil
	}
	if _, err := badger.Exists(dir); err != nil {
		return badger.Content{}, fmt.Errorf("look at the store that is replaced: %w", err)
	}
	c, err := badger.Acknowledged(dir)
	if err != nil {
		return c, fmt.Errorf("look at the store that is replaced: %w", err)
	}
	return c, nil
}

// holdsAll says whether the backup holds all that a store did.
func holdsAll(path string, lost badger.Content) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	backup, err := snapshot.NewReader(f)
	if err != nil || backup.Header().Revision != lost.Revision {
		return false, err
	}
	content, err := badger.ContentOf(lost.Revision, func(yield func(store.KV, error) bool) {
		for _, led := range backup.Header().Led {
			if !yield(store.KV{Key: led.Key, Value: led.Value, ModRevision: led.ModRevision}, nil) {
				return
			}
		}
		backup.All()(yield)
	})
	return content == lost, err
}

// fill imports the backup and compares what is there then with what should be.
func (r *Restored) fill(ctx context.Context, cfg config.Config, path string) error {
	if err := r.eachPair(cfg, path, func(pairs iter.Seq2[store.KV, error]) error {
		return opening.Import(ctx, cfg, r.Revision, uint64(r.Backup.Bytes), pairs)
	}); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	st, err := opening.Existing(ctx, cfg)
	if err != nil {
		return fmt.Errorf("look at what was restored: %w", err)
	}
	err = r.eachPair(cfg, path, func(pairs iter.Seq2[store.KV, error]) (err error) {
		r.Keys, err = snapshot.Compare(pairs, snapshot.NewPages(st).All(ctx))
		return err
	})
	if err = errors.Join(err, st.Close()); err != nil {
		return fmt.Errorf("what was restored is not what was backed up: %w", err)
	}
	return nil
}

// eachPair calls do with what is restored.
func (r *Restored) eachPair(cfg config.Config, path string, do func(iter.Seq2[store.KV, error]) error) error {
	return r.readBackup(path, func(pairs iter.Seq2[store.KV, error]) error { return do(sameTrustDomain(cfg, r.kept(pairs))) })
}

// readBackup calls do with what is in the backup.
func (r *Restored) readBackup(path string, do func(iter.Seq2[store.KV, error]) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	backup, err := snapshot.NewReader(f)
	if err != nil {
		return err
	}
	if backup.Header().Revision != r.Backup.Revision {
		return errors.New("the backup was changed meanwhile")
	}
	return do(backup.All())
}

// sameTrustDomain passes pairs on, and refuses the store of another trust
// domain.
func sameTrustDomain(cfg config.Config, pairs iter.Seq2[store.KV, error]) iter.Seq2[store.KV, error] {
	return mapPairs(pairs, func(kv store.KV) (store.KV, bool, error) {
		if kv.Key != trust.Key || cfg.TrustDomain == "" {
			return kv, true, nil
		}
		b, err := trust.Decode(kv)
		if err == nil && b.TrustDomain.Name() != cfg.TrustDomain {
			err = opening.WithHint(
				fmt.Errorf("it is of trust domain %s, and this CA is configured for %s", b.TrustDomain, cfg.TrustDomain),
				"name a backup or a store of this trust domain, or the configuration of the CA that it is from; there is no store yet",
			)
		}
		return kv, true, err
	})
}

// leaveOut decides what is dangerous to bring back when later records are lost:
// a token that was used since would work again; a replica that was evicted
// since would be one again, and its JWT key trusted; a proposal that was granted
// since could be granted again.
func (r *Restored) leaveOut(cfg config.Config, pairs iter.Seq2[store.KV, error]) error {
	var authorities, realms store.KV
	for kv, err := range pairs {
		switch {
		case err != nil:
			return err
		case attest.SingleUse(kv.Key):
			r.Tokens = append(r.Tokens, kv.Key)
		case kv.Key == trust.AuthoritiesKey:
			authorities = kv
		case kv.Key == replica.RealmKey:
			realms = kv
		case strings.HasPrefix(kv.Key, replica.Prefix):
			if err := r.dropReplica(cfg, kv); err != nil {
				return err
			}
		}
	}
	if err := errors.Join(r.dropJWTKeys(authorities), r.skipRealms(cfg, realms)); err != nil {
		return err
	}
	return r.withdraw(certifiedSince(cfg, r.Backup.CreatedAt, time.Now()))
}

// kept passes on what is not left out, with what is written in place of it.
func (r *Restored) kept(pairs iter.Seq2[store.KV, error]) iter.Seq2[store.KV, error] {
	if r.Lossless {
		return pairs
	}
	return r.withInstead(mapPairs(pairs, func(kv store.KV) (store.KV, bool, error) {
		name, isReplica := strings.CutPrefix(kv.Key, replica.Prefix)
		switch {
		case attest.SingleUse(kv.Key), isReplica && slices.Contains(r.Replicas, name), strings.HasPrefix(kv.Key, approval.Prefix):
			return kv, false, nil
		case kv.Key == trust.AuthoritiesKey && len(r.Replicas) > 0:
			kv, err := trust.AuthoritiesWithout(kv, r.Backup.CreatedAt, r.Replicas...)
			return kv, true, err
		case kv.Key == trust.Key && len(r.jwtKeys) > 0:
			kv, err := trust.Without(kv, r.jwtKeys...)
			return kv, true, err
		}
		return kv, true, nil
	}))
}

// mapPairs calls each for every pair, which says what becomes of it and
// whether it stays.
func mapPairs(pairs iter.Seq2[store.KV, error], each func(store.KV) (store.KV, bool, error)) iter.Seq2[store.KV, error] {
	return func(yield func(store.KV, error) bool) {
		for kv, err := range pairs {
			keep := true
			if err == nil {
				kv, keep, err = each(kv)
			}
			if keep && !yield(kv, err) || err != nil {
				return
			}
		}
	}
}

// record writes down that the store was replaced.
func (r *Restored) record(ctx context.Context, cfg config.Config) error {
	log, err := audit.Open(cfg.AuditPath(), cfg.AuditOptions())
	if err != nil {
		return fmt.Errorf("the store is restored, and that is not recorded: %w", err)
	}
	err = log.Append(ctx, audit.Record{
		Type: audit.Admin, Actor: fmt.Sprintf("uid:%d", os.Geteuid()),
		Detail: fmt.Sprintf("restore the store from a backup of revision %d, to go on above revision %d", r.Backup.Revision, r.Revision),
	})
	return errors.Join(err, log.Close())
}

// maxActs bounds how much of the audit log is held.
const maxActs = 1000

// actsSince reads in the audit log, as far as there is one, what administrators
// did after t. An act that has no outcome there may have been done.
func actsSince(cfg config.Config, t time.Time) (acts []Act) {
	begun := make(map[string]int) // where in acts each one begins
	defer func() { acts = slices.DeleteFunc(acts, func(a Act) bool { return a == Act{} }) }()
	first, err := audit.Begin(cfg.AuditPath())
	if err != nil {
		return nil
	}
	for line, err := range audit.Lines(cfg.AuditPath(), first) {
		if err != nil || len(acts) == maxActs {
			return acts
		}
		var r audit.Record
		if json.Unmarshal(line.Text, &r) != nil || r.Time.Before(t) {
			continue
		}
		begin, known := begun[r.Act]
		if known && !r.Pending {
			acts[begin] = Act{}
		}
		if r.Type != audit.Admin || strings.HasSuffix(r.Detail, api.BackedUp) {
			continue
		}
		if !known && r.Pending {
			begun[r.Act] = len(acts)
			r.Detail += "; its outcome is not recorded"
		}
		acts = append(acts, Act{r.Time, r.Actor, r.Detail, r.SPIFFEID})
	}
	return acts
}
