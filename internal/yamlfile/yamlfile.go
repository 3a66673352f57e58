// SPDX-License-Identifier: Apache-2.0

// Package yamlfile reads YAML files whose errors tell the line and the column.
// What keys there are is said by functions, so that unknown ones are errors.
package yamlfile

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Parse reads a file's content and hands its root to fn. Errors begin with the
// file's name, and where it is known with line and column.
func Parse(file string, b []byte, fn func(*yaml.Node) error) error {
	var doc yaml.Node
	if err := yaml.Load(b, &doc); err != nil {
		var failed *yaml.LoadError
		if errors.As(err, &failed) && failed.Mark.Line > 0 {
			return fmt.Errorf("%s:%d:%d: %s", file, failed.Mark.Line, max(1, failed.Mark.Column), failed.Message)
		}
		if len(strings.TrimSpace(string(b))) == 0 {
			return fmt.Errorf("%s: it is empty", file)
		}
		return fmt.Errorf("%s: %w", file, err)
	}
	if len(doc.Content) == 0 {
		return fmt.Errorf("%s: it is empty", file)
	}
	if err := fn(doc.Content[0]); err != nil {
		var at *placed
		if errors.As(err, &at) {
			return fmt.Errorf("%s:%d:%d: %w", file, at.line, at.column, at.err)
		}
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

// placed is an error with its place in the file.
type placed struct {
	line, column int
	err          error
}

func (p *placed) Error() string { return p.err.Error() }

// Wrong is an error at a node.
func Wrong(n *yaml.Node, format string, args ...any) error {
	return &placed{n.Line, n.Column, fmt.Errorf(format, args...)}
}

// Fields says what to do with the value of each key of a mapping.
type Fields map[string]func(*yaml.Node) error

// Parse goes through the keys of a mapping, each of which may be there once.
func (f Fields) Parse(n *yaml.Node) error {
	return Each(n, func(key string, at, n *yaml.Node) error {
		set, ok := f[key]
		if !ok {
			return Wrong(at, "unknown key %q: there are %s", key, strings.Join(slices.Sorted(maps.Keys(f)), ", "))
		}
		return set(n)
	})
}

// Each goes through the keys of a mapping, whatever they are; each may be there
// once. at is the key's node.
func Each(n *yaml.Node, each func(key string, at, value *yaml.Node) error) error {
	n = Resolved(n)
	if n.Kind != yaml.MappingNode {
		return Wrong(n, "%s where keys with values should be", kind(n))
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		at, value := n.Content[i], n.Content[i+1]
		key, err := Text(at)
		if err != nil {
			return err
		}
		if seen[key] {
			return Wrong(at, "key %q: twice", key)
		}
		seen[key] = true
		if err := each(key, at, value); err != nil {
			return err
		}
	}
	return nil
}

// Nothing says that a key has no value.
func Nothing(n *yaml.Node) bool {
	n = Resolved(n)
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// Resolved follows an alias to what it stands for, which is never an alias.
func Resolved(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	if n.ShortTag() == "!!null" {
		return "nothing"
	}
	return fmt.Sprintf("%q", n.Value)
}

// Text is a value that is written without structure.
func Text(n *yaml.Node) (string, error) {
	n = Resolved(n)
	if n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
		return "", Wrong(n, "%s where a value should be", kind(n))
	}
	return n.Value, nil
}

// Value makes a setter of what parses a text.
func Value[T any](to *T, parse func(string) (T, error)) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		s, err := Text(n)
		if err != nil {
			return err
		}
		v, err := parse(s)
		if err != nil {
			return Wrong(Resolved(n), "%w", err)
		}
		*to = v
		return nil
	}
}

// List goes through the elements of a list.
func List(n *yaml.Node, each func(*yaml.Node) error) error {
	n = Resolved(n)
	if n.Kind != yaml.SequenceNode {
		return Wrong(n, "%s where a list should be", kind(n))
	}
	for _, e := range n.Content {
		if err := each(e); err != nil {
			return err
		}
	}
	return nil
}

// AsIs takes any text.
func AsIs(s string) (string, error) { return s, nil }

// Bool takes true and false.
func Bool(s string) (bool, error) {
	if s != "true" && s != "false" {
		return false, fmt.Errorf("%q: true or false", s)
	}
	return s == "true", nil
}

// Whole takes whole numbers from least to most.
func Whole(least, most int) func(string) (int, error) {
	return func(s string) (int, error) {
		v, err := strconv.Atoi(s)
		if err != nil || v < least || v > most {
			return 0, fmt.Errorf("%q: a whole number from %d to %d", s, least, most)
		}
		return v, nil
	}
}
