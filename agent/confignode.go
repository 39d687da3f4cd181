// The settings by which the node proves itself: one kind of evidence, and nothing
// that belongs to another.

package agent

import (
	"encoding/hex"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"merlon.dev/agent/internal/attest"
)

const (
	byJoinToken = "join_token"
	byX509POP   = "x509pop"
	byK8s       = "k8s"
	byGCP       = "gcp"
	byAzure     = "azure"
	byAWS       = "aws"
)

// evidence lists, by kind, the settings that say where it is; node_metadata_url can
// be left out.
var evidence = map[string][]string{
	byJoinToken: {"join_token", "join_token_file"},
	byX509POP:   {"node_cert_file", "node_key_file"},
	byK8s:       {"k8s_cluster", "k8s_token_file"},
	byGCP:       {"node_audience", "node_metadata_url"},
	byAzure:     {"node_audience", "node_metadata_url"},
	byAWS:       {"node_metadata_url"},
}

func (c Config) evidenceSettings() map[string]string {
	return map[string]string{
		"join_token": c.JoinToken, "join_token_file": c.JoinTokenFile,
		"node_cert_file": c.NodeCertFile, "node_key_file": c.NodeKeyFile,
		"k8s_cluster": c.K8sCluster, "k8s_token_file": c.K8sTokenFile,
		"node_audience": c.NodeAudience, "node_metadata_url": c.NodeMetadataURL,
	}
}

// attestor makes the evidence that is configured.
func (c Config) attestor() attest.Attestor {
	switch c.NodeAttestor {
	case byX509POP:
		return &attest.X509POP{CertFile: c.NodeCertFile, KeyFile: c.NodeKeyFile}
	case byK8s:
		return &attest.K8s{Cluster: c.K8sCluster, TokenFile: c.K8sTokenFile}
	case byGCP:
		return &attest.GCP{Audience: c.NodeAudience, Server: c.NodeMetadataURL}
	case byAzure:
		return &attest.Azure{Audience: c.NodeAudience, Server: c.NodeMetadataURL}
	case byAWS:
		return &attest.AWS{Server: c.NodeMetadataURL}
	}
	return &attest.JoinToken{Token: c.JoinToken, File: c.JoinTokenFile}
}

// goodOnce says whether what is configured does not bring the node back by itself.
func (c Config) goodOnce() bool { return c.NodeAttestor != byX509POP && c.NodeAttestor != byK8s }

func (c Config) checkEvidence() error {
	own, known := evidence[c.NodeAttestor]
	if !known {
		return &InvalidError{Field: "node_attestor", Reason: fmt.Sprintf("%q is none of %s", c.NodeAttestor, strings.Join(kinds(), ", "))}
	}
	settings := c.evidenceSettings()
	for kind, others := range evidence {
		for _, key := range others {
			if !slices.Contains(own, key) && settings[key] != "" {
				return &InvalidError{Field: key, Reason: "is for node_attestor: " + kind + ", which is " + c.NodeAttestor, Hint: "set one kind of evidence"}
			}
		}
	}
	if c.NodeAttestor == byJoinToken {
		if c.JoinToken != "" && c.JoinTokenFile != "" {
			return &InvalidError{Field: "join_token_file", Reason: "join_token is set too; set one of them"}
		}
	} else {
		for _, key := range own {
			if err := checkSource(key, settings[key]); err != nil {
				return err
			}
		}
	}
	return c.checkRootHash()
}

// checkSource judges a setting that must be there; those called …_file are paths.
func checkSource(key, value string) error {
	if key == "node_metadata_url" {
		if u, err := url.Parse(value); value != "" && (err != nil || u.Scheme != "http" || u.Host == "" || u.Path+u.RawQuery != "") {
			return &InvalidError{Field: key, Reason: fmt.Sprintf("%q is not http://host, as metadata servers are", value)}
		}
		return nil
	}
	if value == "" {
		return &InvalidError{Field: key, Reason: "is missing: the node could not prove itself"}
	}
	if strings.HasSuffix(key, "_file") && !filepath.IsAbs(value) {
		return &InvalidError{Field: key, Reason: fmt.Sprintf("%q is not an absolute path", value)}
	}
	return nil
}

func (c Config) checkRootHash() error {
	if c.RootHash == "" {
		if c.NodeAttestor == byJoinToken && c.JoinToken == "" && c.JoinTokenFile == "" {
			return nil
		}
		return &InvalidError{
			Field: "root_hash", Reason: "is needed with a join token or another node_attestor, to tell the right CA from any other",
			Hint: "merlon token create prints it beside the token, merlon trust show at any time",
		}
	}
	if b, err := hex.DecodeString(c.RootHash); err != nil || len(b) != 32 {
		return &InvalidError{Field: "root_hash", Reason: "is not a SHA-256 in hex (64 digits)", Hint: "merlon token create prints it beside the token"}
	}
	return nil
}

func kinds() []string {
	var names []string
	for kind := range evidence {
		names = append(names, kind)
	}
	slices.Sort(names)
	return names
}
