"""Other libraries' trainers, made to train an adapter: one import each, the rest of a script stays as it is.

from rankfold.integrations.transformers import Trainer, Seq2SeqTrainer
from rankfold.integrations.trl import SFTTrainer
from rankfold.integrations.sentence_transformers import SentenceTransformerTrainer
"""
