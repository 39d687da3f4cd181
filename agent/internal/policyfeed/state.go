// What the feed keeps on disk: the last good bundle, the keys that may sign
// it, and the highest generation.

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
	bundleFile = "policy_bundle"
	stateFile  = "policy_state"
)

// state is the form of stateFile.
type state struct {
	Name       string      `json:"name"`
	Generation uint64      `json:"generation"`
	Keys       []storedKey `json:"keys"`
}

type storedKey struct {
	KID       string `json:"kid"`
	PublicKey []byte `json:"public_key"` // PKIX, DER
}

// save keeps a bundle that is about to become active. The generation comes
// first: a crash in between leaves an older bundle, which is then refused,
// never a forgotten generation.
func (f *Feed) save(raw []byte, generation uint64, keys []bundle.Key) error {
	st := state{Name: f.cfg.Name, Generation: generation}
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
	if err := f.cfg.DataDir.Write(stateFile, content); err != nil {
		return err
	}
	return f.cfg.DataDir.Write(bundleFile, raw)
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
	pbs := make([]*capb.PolicyKey, 0, len(st.Keys))
	for _, k := range st.Keys {
		pbs = append(pbs, &capb.PolicyKey{Kid: k.KID, PublicKey: k.PublicKey})
	}
	if f.keys, err = parseKeys(pbs); err != nil {
		return fmt.Errorf("read %s: %w", stateFile, err)
	}
	raw, err := f.cfg.DataDir.Read(ctx, bundleFile)
	if err != nil || raw == nil {
		return err
	}
	if err := f.activate(ctx, raw, f.keys, false); err != nil {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "kept policy bundle not used; the CA's is awaited", slog.Any("err", err))
	}
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
