// The settings of the store and of replicas: which of them go together.

package config

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store/etcd"
)

// The kinds of stores.
const (
	Badger = "badger"
	Etcd   = "etcd"
)

// maxTokenFile bounds what is read of join_token_file.
const maxTokenFile = 1 << 10

func (c Config) checkStore() error {
	if c.DiskReserveMiB < 0 {
		return fmt.Errorf("disk_reserve_mib: %d is negative", c.DiskReserveMiB)
	}
	if c.NewStore && (c.AcceptOlderStore != 0 || c.JoinAddress != "") {
		return errors.New("-new-store: a replica that joins, or a store that is accepted, needs one that is there")
	}
	switch c.Store {
	case Badger:
		if len(c.EtcdEndpoints) > 0 {
			return errors.New("etcd_endpoints: are given, but store is badger")
		}
		return nil
	case Etcd:
		return c.checkEtcd()
	default:
		return fmt.Errorf("store: %q is neither badger nor etcd", c.Store)
	}
}

func (c Config) checkEtcd() error {
	err := c.EtcdStore().Validate()
	if bad, ok := errors.AsType[*etcd.InvalidError](err); ok {
		return fmt.Errorf("etcd_%s: %s", bad.Field, bad.Reason)
	}
	return err
}

func (c Config) checkJoin() error {
	if c.ReplicaName != "" {
		if err := replica.CheckName(c.ReplicaName); err != nil {
			return err
		}
	}
	token := c.JoinToken != "" || c.JoinTokenFile != ""
	if c.JoinAddress == "" && !c.Nested() {
		if token {
			return errors.New("join_address: is missing, and there is a join token")
		}
		return nil
	}
	if !c.Nested() && c.Store != Etcd {
		return errors.New("join_address: replicas share a store, so store must be etcd; a CA with a store of its own is nested: upstream: merlon")
	}
	key, address := c.RootHolder()
	if host, _, err := net.SplitHostPort(address); err != nil || host == "" || checkAddress(address) != nil {
		return fmt.Errorf("%s: %q: want host:port", key, address)
	}
	if c.JoinToken != "" && c.JoinTokenFile != "" {
		return errors.New("join_token_file: join_token is set too; set one of them")
	}
	if token && c.RootHash == "" {
		return errors.New("root_hash: is needed with a join token, to tell the right CA from any other")
	}
	if c.RootHash != "" {
		if b, err := hex.DecodeString(c.RootHash); err != nil || len(b) != sha256.Size {
			return errors.New("root_hash: is not a SHA-256 in hex (64 digits)")
		}
	}
	return nil
}

// Nested says whether this CA has a store of its own below another CA of Merlon.
func (c Config) Nested() bool { return c.Upstream == UpstreamMerlon }

// RootHolder is the address of the CA that holds the root key, with its setting.
func (c Config) RootHolder() (key, address string) {
	if c.Nested() {
		return "upstream_address", c.UpstreamAddress
	}
	return "join_address", c.JoinAddress
}

// ReadJoinToken is the token by which this replica joins; empty where none is
// configured. The file is read when the token is needed.
func (c Config) ReadJoinToken() (string, error) {
	if c.JoinTokenFile == "" {
		return c.JoinToken, nil
	}
	data, err := os.ReadFile(c.JoinTokenFile)
	if err != nil {
		return "", fmt.Errorf("read the join token: %w", err)
	}
	if len(data) > maxTokenFile {
		return "", fmt.Errorf("read the join token: %s has more than %d bytes", c.JoinTokenFile, maxTokenFile)
	}
	return strings.TrimSpace(string(data)), nil
}

// DiskReserve is disk_reserve_mib in bytes.
func (c Config) DiskReserve() uint64 { return uint64(max(c.DiskReserveMiB, 0)) << 20 }

// StoreDir is the folder of a Badger store.
func (c Config) StoreDir() string { return filepath.Join(c.DataDir, "store") }

// EtcdStore is the store in etcd.
func (c Config) EtcdStore() etcd.Config {
	return etcd.Config{
		Endpoints: c.EtcdEndpoints, CAFile: c.EtcdCAFile, CertFile: c.EtcdCertFile, KeyFile: c.EtcdKeyFile,
		Prefix: c.EtcdPrefix, Logger: c.Logger,
	}
}

// EtcdKeys begins all keys in etcd.
func (c Config) EtcdKeys() string { return cmp.Or(c.EtcdPrefix, etcd.DefaultPrefix) }

// StorePlace names where the store is.
func (c Config) StorePlace() string {
	if c.Store == Etcd {
		return c.EtcdKeys() + " in etcd at " + strings.Join(c.EtcdEndpoints, ", ")
	}
	return c.StoreDir()
}
