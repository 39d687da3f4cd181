// What the feed keeps on disk: the last good bundle and its candidate, the keys that
// may sign them, the highest generations, and where the candidate decides.

package policyfeed

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
)

const (
	bundleFile    = "policy_bundle"
	candidateFile = "policy_candidate"
	stateFile     = "policy_state"
)

// state is the form of stateFile.
type state struct {
	Name       string      `json:"name"`
	Generation uint64      `json:"generation"`
	Keys       []storedKey `json:"keys"`
	// Candidate is the one in use, 0 for none; Tried is the highest ever.
	Candidate uint64  `json:"candidate,omitempty"`
	Tried     uint64  `json:"tried,omitempty"`
	Rollout   rollout `json:"rollout,omitzero"`
}

type storedKey struct {
	KID       string `json:"kid"`
	PublicKey []byte `json:"public_key"` // PKIX, DER
}

// save keeps what is about to be in use. The bundle comes before the generations: a crash
// in between leaves one that is newer than is noted, which restore takes up and notes.
// The other way round it would leave one that is too old to be used, and a node without
// a policy. Of a candidate a crash leaves one that is not the one meant.
func (f *Feed) save(d *draft, keys []bundle.Key) error {
	st := state{
		Name: f.cfg.Name, Generation: max(f.Seen(), generationOf(d.Active)),
		Candidate: generationOf(d.Candidate), Tried: max(f.tried, generationOf(d.Candidate)), Rollout: d.rollout,
	}
	for _, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k.PublicKey)
		if err != nil {
			return fmt.Errorf("encode policy key %s: %w", k.KID, err)
		}
		st.Keys = append(st.Keys, storedKey{KID: k.KID, PublicKey: der})
	}
	content, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encode the policy's state: %w", err)
	}
	if d.raw != nil {
		if err := f.cfg.DataDir.Write(bundleFile, d.raw); err != nil {
			return err
		}
	}
	if err := f.cfg.DataDir.Write(stateFile, content); err != nil {
		return err
	}
	if d.rawCandidate != nil {
		return f.cfg.DataDir.Write(candidateFile, d.rawCandidate)
	}
	return nil
}

// restore reads what save wrote. A bundle that is not good any more is left
// out: the CA has another. An unreadable state is an error, because what it
// forgets could be replayed.
func (f *Feed) restore(ctx context.Context) error {
	content, err := f.cfg.DataDir.Read(ctx, stateFile)
	if err != nil || content == nil {
		return err
	}
	var st state
	if err := json.Unmarshal(content, &st); err != nil {
		return fmt.Errorf("read %s: %w", stateFile, err)
	}
	if st.Name != f.cfg.Name {
		return nil // another bundle is configured now
	}
	f.highest.Store(st.Generation)
	f.tried = st.Tried
	pbs := make([]*capb.PolicyKey, 0, len(st.Keys))
	for _, k := range st.Keys {
		pbs = append(pbs, &capb.PolicyKey{Kid: k.KID, PublicKey: k.PublicKey})
	}
	keys, err := parseKeys(pbs)
	if err != nil {
		return fmt.Errorf("read %s: %w", stateFile, err)
	}
	f.want.keys = keys
	raw, err := f.cfg.DataDir.Read(ctx, bundleFile)
	if err != nil || raw == nil {
		return err
	}
	d := draft{raw: raw}
	if d.Active, err = f.compile(ctx, raw, keys, bundle.Expect{MinGeneration: st.Generation}); err != nil {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "kept policy bundle not used; the CA's is awaited", slog.Any("err", err))
		return nil
	}
	if err := f.restoreCandidate(ctx, &d, &st, keys); err != nil {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "kept policy candidate not used; the CA's is awaited", slog.Any("err", err))
	}
	return f.use(ctx, &d, keys, d.Active.Generation() > st.Generation)
}

// restoreCandidate takes up the candidate that st names, if it is that which is kept.
func (f *Feed) restoreCandidate(ctx context.Context, d *draft, st *state, keys []bundle.Key) error {
	if st.Candidate == 0 {
		return nil
	}
	raw, err := f.cfg.DataDir.Read(ctx, candidateFile)
	if err != nil || raw == nil {
		return err
	}
	e, err := f.compile(ctx, raw, keys, bundle.Expect{MinGeneration: max(st.Tried, d.Active.Generation()+1), Candidate: true})
	if err != nil {
		return err
	}
	if e.Generation() != st.Candidate {
		return fmt.Errorf("it is generation %d, not %d", e.Generation(), st.Candidate)
	}
	d.Candidate, d.rawCandidate, d.rollout, d.Step = e, raw, st.Rollout, st.Rollout.Step
	return nil
}

func parseKeys(pbs []*capb.PolicyKey) ([]bundle.Key, error) {
	keys := make([]bundle.Key, 0, len(pbs))
	for _, pb := range pbs {
		pub, err := x509.ParsePKIXPublicKey(pb.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("policy key %q: %w", pb.GetKid(), err)
		}
		key, ok := pub.(*ecdsa.PublicKey)
		if !ok || key.Curve != elliptic.P256() {
			return nil, fmt.Errorf("policy key %q: not ECDSA P-256", pb.GetKid())
		}
		if pb.GetKid() == "" {
			return nil, errors.New("policy key without kid")
		}
		keys = append(keys, bundle.Key{KID: pb.GetKid(), PublicKey: key})
	}
	return keys, nil
}
